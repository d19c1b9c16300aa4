"""AdaptiveK: probe, budget and selection against formulas written independently; phases and resuming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from softsae import AdaptiveKConfig, AutoencoderConfig, RunConfig, SparseAutoencoder, TrainConfig
from softsae.activations.tensors import TensorSource
from softsae.complexity import to_scale
from softsae.config import resolve, resolve_autoencoder
from softsae.schedules import Phase, Schedule

D, N, B, K = 12, 40, 9, 5.0
FROZEN = Phase(alpha=1e-2, k_target=K, hard=False, learns="frozen_estimator", step=3)
JOINT = FROZEN._replace(learns="all", step=95)


def config(**options) -> AutoencoderConfig:
    options = {"alpha": 1e-2, **options}
    return AutoencoderConfig(d=D, n=N, k=K, architecture="adaptivek", adaptivek=AdaptiveKConfig(**options))


def autoencoder(mode="corrected", **options) -> SparseAutoencoder:
    """With a probe that spreads the scores over all of 0 ... 10 and beyond."""
    sae = SparseAutoencoder(resolve_autoencoder(config(**options), mode), seed=1)
    rule = sae.selector
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.b_enc.uniform_(-0.1, 0.1, generator=draw)
        sae.b_dec.uniform_(-0.5, 0.5, generator=draw)
        for parameter in (rule.w, rule.mean, rule.fitted_w):
            parameter.copy_(torch.randn(D, generator=draw))
        rule.b.fill_(4.5)
    return sae


def samples(count: int = B, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def budget_of(x: torch.Tensor, rule, k_min: float, k_max: float) -> list[float]:
    budgets = []
    for row in x.double():
        s = rule.b.item()
        for w, value, mean in zip(rule.w.tolist(), row.tolist(), rule.mean.tolist(), strict=True):
            s += w * (value - mean)
        s = min(max(s, 0.0), 10.0)
        budgets.append(k_min + (k_max - k_min) / (1 + math.exp(-6 * (s / 10 - 0.5))))
    return budgets


def kept(sae, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    latents = torch.zeros_like(a)
    for row, count in enumerate(counts):
        chosen = sorted(range(N), key=lambda i: (-a[row, i].item(), i))[:count]
        latents[row, chosen] = a[row, chosen]
    return latents


@pytest.mark.parametrize("phase", [None, FROZEN, JOINT])
def test_the_budget_is_the_formula_and_the_largest_are_kept(phase):
    sae = autoencoder(k_min=2.0, k_max=23.0)
    x = samples(40)
    out = sae(x, phase)
    budgets = budget_of(x, sae.selector, 2.0, 23.0)
    assert out.k_hat.tolist() == pytest.approx(budgets, rel=1e-5)
    counts = [math.floor(k + 0.5) for k in budgets]
    assert min(counts) == 3 and max(counts) == 22  # sigmoid(-3) and sigmoid(3) of the way: both clamps
    torch.testing.assert_close(out.latents, kept(sae, x, counts), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.encode(x), out.latents)


def test_bounds_follow_k_and_the_midpoint_is_k():
    published = resolve_autoencoder(
        AutoencoderConfig(d=D, n=4096, k=170, architecture="adaptivek"), "published"
    )
    assert (published.adaptivek.k_min, published.adaptivek.k_max) == (20, 320)
    for given, bounds in (
        ({}, (10 / 17, 160 / 17)),
        ({"k_min": 3.0}, (3, 7)),
        ({"k_max": 8.0}, (2, 8)),
        ({"k_max": 20.0}, (0, 20)),
        ({"k_min": 1.0, "k_max": 30.0}, (1, 30)),
    ):
        options = resolve_autoencoder(config(**given)).adaptivek
        assert (options.k_min, options.k_max) == pytest.approx(bounds)
    full = resolve_autoencoder(AutoencoderConfig(d=D, n=10, k=10, architecture="adaptivek"))
    assert (full.adaptivek.k_min, full.adaptivek.k_max) == (10, 10)
    fresh = SparseAutoencoder(AutoencoderConfig(d=D, n=N, k=K, architecture="adaptivek"))
    assert fresh(samples()).k_hat.tolist() == pytest.approx([K] * B)  # a probe that is not fitted says 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k_min": 6.0, "k_max": 5.5}, "k_min=6.0 exceeds k_max=5.5"),
        ({"k_min": 6.0}, "k_min=6.0 exceeds k=5.0"),
        ({"k_max": 4.0}, "k_max=4.0 is below k=5.0"),
        ({"k_max": 41.0}, "k_max=41.0 must be a number >= 0 and <= 40"),
        ({"k_min": -1.0}, "k_min=-1.0 must be a number >= 0"),
        ({"ridge": 0.0}, "ridge=0.0 must be a number > 0"),
        ({"scores": "local_dim"}, "scores='local_dim' must be one of 'local_dimension', 'token_loss' or an"),
        ({"mapping": "log"}, "mapping='log' must be one of 'ranks', 'min_max', 'none'"),
        ({"samples": 1}, "samples=1 must be an integer >= 2"),
        ({"neighbours": 1}, "neighbours=1 must be an integer >= 2"),
        ({"joint_from": 1.5}, "joint_from=1.5"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"selection_gradient": "k"}, "selection_gradient='k'"),
        ({"probe_weight": -1.0}, "probe_weight=-1.0"),
        ({"deviation_weight": -1.0}, "deviation_weight=-1.0"),
        ({"l1_weight": -1.0}, "l1_weight=-1.0"),
    ],
)
def test_fields_are_refused_by_name_and_value(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_modes():
    def of(mode):
        return resolve(RunConfig(config(), TrainConfig(mode=mode)), D)

    ours, theirs = of("corrected"), of("published")
    names = ("selection_gradient", "probe_weight", "deviation_weight", "l1_weight")
    assert [getattr(ours.autoencoder.adaptivek, name) for name in names] == [True, 0, 0, 0]
    assert [getattr(theirs.autoencoder.adaptivek, name) for name in names] == [False, 0.9, 0.45, 0.005]
    assert theirs.train.hard_phase == "all"  # SoftSAE's last phase is not AdaptiveK's
    assert resolve(theirs, D) == theirs


def planted(count: int, noise: float, seed: int = 0):
    """Activations with scores that are linear in them but for noise, in 0 ... 10."""
    x = samples(count, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    signal = x @ torch.randn(D, generator=draw)
    scores = signal / signal.std() + noise * torch.randn(count, generator=draw)
    return x, (5 + scores).clamp(0, 10)


def prepared(source, scores, tmp_path, mode="corrected", seed=0, x=None, **options):
    np.save(tmp_path / "s.npy", np.asarray(scores))
    options = {"scores": str(tmp_path / "s.npy"), "mapping": "none", **options}
    sae = SparseAutoencoder(resolve_autoencoder(config(**options), mode))
    x = source.x if x is None else x
    sae.initialize(x)
    return sae, sae.selector.prepare(sae, x, source, seed)


def test_the_probe_is_the_ridge_regression_of_the_samples_that_are_not_held_out(tmp_path):
    x, scores = planted(500, noise=0.5)
    x = 3 * x + 2
    sae, said = prepared(TensorSource(x), scores, tmp_path, ridge=70.0)
    rule = sae.selector
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0)).numpy()
    held, rest = order[:100], order[100:]
    units = (x.double() / x.double().pow(2).mean().sqrt()).numpy()
    y = scores.double().numpy()
    mean, middle = units[rest].mean(0), y[rest].mean()
    # Ridge as least squares: one more row of sqrt(weight) for each coordinate.
    rows = np.concatenate([units[rest] - mean, math.sqrt(70.0) * np.eye(D)])
    w = np.linalg.lstsq(rows, np.concatenate([y[rest] - middle, np.zeros(D)]), rcond=None)[0]
    np.testing.assert_allclose(rule.w.detach().numpy(), w, rtol=1e-4, atol=1e-6)
    assert rule.b.item() == pytest.approx(middle) and torch.equal(rule.w, rule.fitted_w)
    predicted = np.clip((units[held] - mean) @ w + middle, 0, 10)
    r2 = 1 - ((y[held] - predicted) ** 2).sum() / ((y[held] - y[held].mean()) ** 2).sum()
    assert said == {"probe_r2": pytest.approx(r2, rel=1e-4), "fitted": 400, "held_out": 100}
    assert rule.r2.item() == pytest.approx(r2, rel=1e-4)
    expected = [np.clip((row - mean) @ w + middle, 0, 10) for row in units[:9]]
    share = [1 / (1 + math.exp(-6 * (s / 10 - 0.5))) for s in expected]
    k_min, k_max = rule.options.k_min, rule.options.k_max
    budgets = [k_min + s * (k_max - k_min) for s in share]
    assert sae(x[:9]).k_hat.tolist() == pytest.approx(budgets, rel=1e-4)


def test_the_probe_does_not_depend_on_the_units(tmp_path):
    x, scores = planted(500, noise=0.5)
    options = {"d": D, "n": N, "k": K, "architecture": "adaptivek"}
    np.save(tmp_path / "s.npy", scores)
    section = AdaptiveKConfig(scores=str(tmp_path / "s.npy"), mapping="none")
    found = []
    for normalization in ("unit_mean_square", "unit_mean_norm", "none"):
        sae = SparseAutoencoder(AutoencoderConfig(**options, normalization=normalization, adaptivek=section))
        for scaled in (x, 100 * x):
            sae.initialize(scaled)
            sae.selector.prepare(sae, scaled, TensorSource(scaled), 0)
            found.append(sae(scaled).k_hat.detach())
    for k_hat in found[1:]:
        torch.testing.assert_close(k_hat, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise, r2", [(0.0, 1.0), (1.0, 0.5), (1000.0, 0.0)])
def test_r2_is_the_share_of_the_scores_that_is_linear(noise, r2, tmp_path):
    x, scores = planted(8000, noise)
    if noise > 2:
        scores = to_scale(scores, "min_max")
    _, said = prepared(TensorSource(x), scores, tmp_path, ridge=1.0)
    assert said["probe_r2"] == pytest.approx(r2, abs=0.04)


def test_equal_scores_give_every_sample_k(tmp_path):
    x = samples(300)
    for mapping in ("ranks", "min_max"):
        sae, said = prepared(TensorSource(x), np.full(300, 7, np.int64), tmp_path, mapping=mapping)
        assert said["probe_r2"] is None and sae.selector.r2.isnan()
        assert sae(x).k_hat.tolist() == pytest.approx([K] * 300, rel=1e-5)


def reference_loss(parts, sae, x, phase):
    """The loss terms of a phase, written out."""
    rule, options = sae.selector, sae.config.adaptivek
    out, x = sae(x, phase), sae.normalize(x)
    expected = {"reconstruction"}
    if options.l1_weight:
        l1 = sum(out.latents[i].sum() / x[i].norm() for i in range(len(x))) / len(x)
        torch.testing.assert_close(out.losses["l1"], l1)
        expected |= {"l1"}
    if "deviation" in parts:
        before = (x - rule.mean) @ rule.fitted_w + rule.fitted_b
        after = (x - rule.mean) @ rule.w + rule.b
        torch.testing.assert_close(out.losses["deviation"], ((after - before) ** 2).mean())
    assert set(out.losses) == expected | parts
    return out


def test_the_probe_is_frozen_then_learns_by_the_selection():
    sae = autoencoder(k_min=1.0, k_max=30.0)
    x = samples(200)
    sum(reference_loss(set(), sae, x, FROZEN).losses.values()).backward()
    assert sae.selector.w.grad is None and sae.selector.b.grad is None
    assert sae.W_enc.grad.abs().sum() > 0
    to_encoder = sae.W_enc.grad.clone()
    sae.zero_grad(set_to_none=True)
    out = reference_loss({"budget"}, sae, x, JOINT)
    out.losses["reconstruction"].backward(retain_graph=True)
    torch.testing.assert_close(sae.W_enc.grad, to_encoder)  # the selection's gradient goes to k only
    # d loss / d k of a row, through its soft gates at the same activations; then the chain to w and b.
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    k = out.k_hat.detach().clone().requires_grad_()
    gates = soft_gates(a, k)
    value = (a * (out.latents != 0)) @ sae.W_dec + sae.b_dec - x
    by_gate = 2 * (value @ sae.W_dec.T) * a / len(x)
    (by_k,) = torch.autograd.grad((gates * by_gate.detach()).sum(), k)
    s = (x - sae.selector.mean) @ sae.selector.w.detach() + 4.5
    inside = (s > 0) & (s < 10)
    share = torch.sigmoid(6 * (s / 10 - 0.5))
    by_s = by_k * inside * 29 * share * (1 - share) * 0.6
    torch.testing.assert_close(
        sae.selector.w.grad, by_s @ (x - sae.selector.mean), rtol=1e-3, atol=1e-4 * by_s.abs().sum().item()
    )
    assert sae.selector.b.grad.item() == pytest.approx(by_s.sum().item(), rel=1e-3)
    assert by_s.abs().max() > 1e-4 and 0 < inside.sum() < len(x)
    sae.selector.b.grad = None
    out.losses["budget"].backward()
    mean = out.k_hat.mean().item()
    slope = torch.sigmoid(torch.tensor(5.0 * (mean - K))).item()
    by_b = (slope * inside * 29 * share * (1 - share) * 0.6).mean().item()
    assert sae.selector.b.grad.item() == pytest.approx(by_b, rel=1e-3)


def soft_gates(a: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Soft top-k at alpha = 1e-2: the threshold by bisection, and one Newton step for its gradient."""
    alpha = 1e-2
    a64 = a.double()

    def laplace(b):
        t = (a64 - b[:, None]) / alpha
        return torch.where(t <= 0, torch.exp(t.clamp(max=0)) / 2, 1 - torch.exp(-t.clamp(min=0)) / 2)

    low, high = a64.amin(1) - 1, a64.amax(1) + 1
    for _ in range(100):
        middle = (low + high) / 2
        more = laplace(middle).sum(1) > k.detach()
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    density = torch.exp(-((a64 - low[:, None]) / alpha).abs()).sum(1) / (2 * alpha)
    return laplace(low - (k.double() - k.detach().double()) / density)


def test_published_the_probe_learns_from_its_scores_alone(tmp_path):
    x, scores = planted(600, noise=0.7)
    sae, _ = prepared(TensorSource(x), scores, tmp_path, mode="published", ridge=70.0)
    rule = sae.selector
    with torch.no_grad():
        rule.w.add_(0.1 * samples(1, seed=5)[0])
        rule.b.add_(0.3)
    out = reference_loss({"probe", "deviation"}, sae, x[:50], JOINT)
    units = sae.normalize(x)
    rest = torch.randperm(600, generator=torch.Generator().manual_seed(0))[120:]
    error = (units[rest] - rule.mean) @ rule.w + rule.b - scores[rest]
    torch.testing.assert_close(out.losses["probe"], error.pow(2).mean(), rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(out.losses["probe"], (rule.w, rule.b))
    expected = torch.autograd.grad(error.pow(2).mean(), (rule.w, rule.b))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all(g is None for g in torch.autograd.grad(
        sae(x[:50], JOINT).losses["reconstruction"], (rule.w, rule.b), allow_unused=True))  # fmt: skip
    train = resolve(RunConfig(sae.config, TrainConfig(mode="published", steps=100)), D).train
    at = [rule.loss_weights(train, 2.0, step) for step in (50, 89, 94, 99)]
    assert [weights["deviation"] for weights in at] == pytest.approx([0, 0, 0.45, 0.9])
    assert at[0]["probe"] == 1.8 and at[0]["l1"] == 0.01


@pytest.mark.parametrize("mode", ["corrected", "published"])
def test_the_budget_and_the_losses_are_float32_under_autocast(mode):
    sae, x = autoencoder(mode), samples()
    with torch.autocast("cpu", torch.bfloat16):
        out = sae(x, JOINT)
    plain = sae(x, JOINT)
    assert out.k_hat.dtype == torch.float32 and torch.equal(out.k_hat, plain.k_hat)
    for name in set(out.losses) - {"reconstruction", "l1"}:
        torch.testing.assert_close(out.losses[name], plain.losses[name], rtol=1e-6, atol=0)
    assert ("deviation" in out.losses) == (mode == "published")


def test_the_joint_phase_begins_where_it_should():
    run = resolve(RunConfig(config(joint_from=0.7), TrainConfig(steps=50, hard_steps=0)), D)
    learns = [Schedule(run).phase(step).learns for step in range(50)]
    assert learns == ["frozen_estimator"] * 35 + ["all"] * 15
    never = resolve(RunConfig(config(joint_from=1), TrainConfig(steps=50)), D)
    assert {Schedule(never).phase(step).learns for step in range(50)} == {"frozen_estimator"}


def test_no_active_latent_and_a_batch_of_one():
    sae = autoencoder(k_min=0.0)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    for phase in (None, FROZEN, JOINT):
        out = sae(samples(1), phase)
        assert (out.latents == 0).all() and out.k_hat.shape == (1,)
    out.losses["reconstruction"].backward()
    assert sae.selector.w.grad.abs().sum() == 0
    nothing = autoencoder(k_min=0.0, k_max=10.0)
    with torch.no_grad():
        nothing.selector.w.zero_()
        nothing.selector.b.fill_(-1e6)
    out = nothing(samples(), JOINT)  # sigmoid(-3) of 10 is less than half a latent
    assert (out.latents == 0).all() and out.k_hat.tolist() == pytest.approx([10 / (1 + math.exp(3))] * B)
    everything = SparseAutoencoder(AutoencoderConfig(
        d=D, n=4, k=4, architecture="adaptivek", adaptivek=AdaptiveKConfig(k_min=4.0)))  # fmt: skip
    x = samples()
    torch.testing.assert_close(everything.encode(x), torch.relu(everything.pre_activations(x)))
