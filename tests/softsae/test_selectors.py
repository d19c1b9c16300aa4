"""Selection rules against formulas written independently, and where their gradients go."""

from __future__ import annotations

import math

import pytest
import torch

from softsae import AutoencoderConfig, EstimatorConfig, SparseAutoencoder, TrainConfig, Trainer, evaluate
from softsae.activations.synthetic import SyntheticSource
from softsae.architectures import BatchTopKConfig, JumpReLUConfig, MSAEConfig
from softsae.config import square_norm
from softsae.schedules import Phase
from softsae.selectors.batchtopk import spread_topk
from softtopk import hard_topk
from tests.softsae.configs import model

D, N, B = 12, 40, 9
SOFT = Phase(alpha=0.05, k_target=5.0, hard=False)
HARD = SOFT._replace(hard=True)


def autoencoder(**fields) -> SparseAutoencoder:
    sae = SparseAutoencoder(model(**{"d": D, "n": N, "k": 5.0, **fields}), seed=1)
    with torch.no_grad():
        sae.b_enc.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(2))
        sae.b_dec.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3))
    return sae


def samples(count: int = B) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(0))


def laplace_gates(a: torch.Tensor, k: float, alpha: float) -> torch.Tensor:
    """Soft top-k of one row by bisection on the threshold, in float64."""
    a = a.double()

    def gates(b):
        t = (a - b) / alpha
        return torch.where(t <= 0, torch.exp(t.clamp(max=0)) / 2, 1 - torch.exp(-t.clamp(min=0)) / 2)

    low, high = a.min().item() - 100 * alpha, a.max().item() + 100 * alpha
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gates(middle).sum() > k else (low, middle)
    return gates(low)


def rounded(k: torch.Tensor) -> list[int]:
    return [int(value + 0.5) for value in k.tolist()]


def keep_largest(a: torch.Tensor, counts: list[int]) -> torch.Tensor:
    kept = torch.zeros_like(a)
    for row, count in enumerate(counts):
        chosen = sorted(range(a.shape[1]), key=lambda i: (-a[row, i].item(), i))[:count]
        kept[row, chosen] = a[row, chosen]
    return kept


def test_topk_keeps_the_k_largest():
    sae = autoencoder(architecture="topk", k=5)
    x = samples()
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    torch.testing.assert_close(sae.encode(x), keep_largest(a, [5] * B), rtol=1e-5, atol=1e-6)


def test_softsae_soft_latents_are_activations_times_laplace_gates():
    sae = autoencoder()
    x = samples()
    out = sae(x, SOFT)
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    gates = torch.stack([laplace_gates(a[i], out.k_hat[i].item(), SOFT.alpha) for i in range(B)])
    torch.testing.assert_close(out.latents.double(), a.double() * gates, rtol=1e-4, atol=1e-5)


def test_gates_below_two_to_the_minus_24_do_not_count_as_active():
    sae = autoencoder()
    phase = SOFT._replace(alpha=0.01)
    x = samples()
    out = sae(x, phase)
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    gates = torch.stack([laplace_gates(a[i], out.k_hat[i].item(), phase.alpha) for i in range(B)])
    clear = (gates / 2**-24).log().abs() > 0.01
    active = (gates >= 2**-24) & (a > 0)
    assert torch.equal((out.latents != 0)[clear], active[clear])
    assert 0 < (gates[~active & (a > 0)] > 0).sum()  # some are there to be dropped


@pytest.mark.parametrize("rounding", ["nearest", "floor"])
def test_softsae_hard_latents_are_the_round_k_hat_largest(rounding):
    sae = autoencoder(rounding=rounding, k_max=20.0)
    with torch.no_grad():
        sae.selector.estimator.w2.uniform_(-0.7, 0.7, generator=torch.Generator().manual_seed(0))
    x = samples()
    out = sae(x)
    counts = rounded(out.k_hat) if rounding == "nearest" else [int(k) for k in out.k_hat.tolist()]
    assert len(set(counts)) > 2
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    torch.testing.assert_close(out.latents, keep_largest(a, counts), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.encode(x), out.latents)
    torch.testing.assert_close(sae(x, HARD).latents, out.latents)


def gradients(share, phase=SOFT, **fields):
    """Gradients of the reconstruction error to W_enc and w2."""
    sae = autoencoder(selection_gradient=share, **fields)
    sae(samples(), phase).losses["reconstruction"].backward()
    return sae.W_enc.grad, sae.selector.estimator.w2.grad


def through_kept_values():
    """The same to W_enc with the gates as constants: f = a * gate."""
    sae = autoencoder()
    x = samples()
    with torch.no_grad():
        out = sae(x, SOFT)
        a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        gates = torch.where(a > 0, out.latents / a, 0)
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    (((a * gates) @ sae.W_dec + sae.b_dec - x) ** 2).sum(1).mean().backward()
    return sae.W_enc.grad


def test_selection_gradient_to_k_leaves_the_encoder_only_the_kept_values():
    to_encoder, to_estimator = gradients("k")
    torch.testing.assert_close(to_encoder, through_kept_values(), rtol=1e-4, atol=1e-5)
    assert to_estimator.abs().max() > 1e-3


def test_selection_gradient_all_is_the_derivative_of_the_soft_reconstruction():
    sae = autoencoder(selection_gradient="all", estimator=EstimatorConfig(moves_b_dec=True)).double()
    x = samples().double()
    sae(x, SOFT).losses["reconstruction"].backward()
    for parameter in (sae.W_enc, sae.b_dec, sae.b_enc, sae.selector.estimator.w2, sae.selector.estimator.W):
        index = tuple(i // 2 for i in parameter.shape)
        with torch.no_grad():
            values = []
            for step in (1e-6, -1e-6):
                parameter[index] += step
                values.append(((sae(x, SOFT).x_hat - x) ** 2).sum(1).mean().item())
                parameter[index] -= step
        numeric = (values[0] - values[1]) / 2e-6
        assert parameter.grad[index].item() == pytest.approx(numeric, rel=2e-3, abs=1e-6)


def test_selection_gradient_as_a_number_interpolates():
    to_k, to_all = gradients("k"), gradients("all")
    quarter = gradients(0.25)
    torch.testing.assert_close(quarter[0], 0.75 * to_k[0] + 0.25 * to_all[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quarter[1], to_k[1])
    assert (to_all[0] - to_k[0]).abs().max() > 1e-2


def test_hard_phase_all_trains_kept_values_and_estimator():
    to_encoder, to_estimator = gradients("k", HARD)
    assert to_estimator.abs().max() > 1e-3
    sae = autoencoder()
    x = samples()
    mask = sae.encode(x).detach() != 0
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    (((a * mask) @ sae.W_dec + sae.b_dec - x) ** 2).sum(1).mean().backward()
    torch.testing.assert_close(to_encoder, sae.W_enc.grad, rtol=1e-4, atol=1e-5)


def test_hard_phase_frozen_estimator_and_decoder_only():
    for learns, encoder_learns in (("frozen_estimator", True), ("decoder", False)):
        sae = autoencoder()
        out = sae(samples(), HARD._replace(learns=learns))
        assert "budget" not in out.losses
        sum(out.losses.values()).backward()
        assert all(p.grad is None for p in sae.selector.parameters())
        assert (sae.W_enc.grad is not None and sae.W_enc.grad.abs().max() > 0) == encoder_learns
        assert sae.W_dec.grad.abs().max() > 0


def test_batchtopk_keeps_the_largest_of_the_batch_and_follows_the_smallest():
    section = BatchTopKConfig(threshold_decay=0.75, threshold_from=1)
    sae = autoencoder(architecture="batchtopk", k=2.5, batchtopk=section).train()
    x = samples()
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    order = sorted((-a[i, j].item(), i, j) for i in range(B) for j in range(N))
    expected = torch.zeros_like(a)
    for value, i, j in order[: math.floor(2.5 * B + 0.5)]:
        expected[i, j] = -value
    smallest = expected[expected > 0].min()
    for step in range(3):
        out = sae(x, HARD._replace(step=step))
    torch.testing.assert_close(out.latents.detach(), expected, rtol=1e-5, atol=1e-6)
    assert out.k_hat.tolist() == (expected != 0).sum(1).tolist()
    torch.testing.assert_close(sae.selector.threshold, smallest)
    sae(samples() * 2, HARD._replace(step=3))
    moved = sae.selector.threshold
    assert moved > smallest  # a quarter of the way
    kept = sae.eval().encode(x)
    torch.testing.assert_close(kept, a * (a > moved), rtol=1e-5, atol=1e-6)
    alone = torch.cat([sae.encode(row[None]) for row in x])
    assert torch.equal(alone != 0, kept != 0)


@pytest.mark.parametrize("count", [0, 1, 7, 60, 250, 300])
def test_the_largest_of_a_batch_on_a_gpu_are_those_of_hard_topk(count):
    a = torch.randn(300, generator=torch.Generator().manual_seed(count)).relu().mul(4).round()  # with ties
    assert (a > 0).sum() > 60 and len(a.unique()) < 20
    assert torch.equal(spread_topk(a, count), hard_topk(a, count))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 33), (2048, 4096)])
def test_batchtopk_on_a_gpu(shape):
    selector = autoencoder(architecture="batchtopk", k=2.5).selector
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu()
    assert torch.equal(selector.of_batch(a.cuda()).cpu(), selector.of_batch(a))


def test_jumprelu_is_the_formula_and_its_thresholds_get_the_kernel_gradient():
    section = JumpReLUConfig(threshold=0.3 / D**0.5, bandwidth=0.2 / D**0.5)  # |x|^2 is D in the mean
    sae = autoencoder(architecture="jumprelu", k=4.0, jumprelu=section).double()
    theta = sae.selector.threshold
    x = samples().double()
    z = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    out = sae(x, HARD)
    gates = z > 0.3
    torch.testing.assert_close(out.latents.detach(), z * gates)
    l0 = gates.sum() / B
    assert out.losses["sparsity"].item() == pytest.approx((l0.item() / 4 - 1) ** 2)
    error = (out.x_hat - x).detach()
    of_latents = 2 * error @ sae.W_dec.T / B
    of_gates = 2 * (l0 / 4 - 1) / 4 / B
    near = ((z - 0.3).abs() <= 0.1) / 0.2
    expected = -(near * (0.3 * of_latents + of_gates)).sum(0)
    (found,) = torch.autograd.grad(out.losses["reconstruction"] + out.losses["sparsity"], theta)
    assert near.any()
    torch.testing.assert_close(found, expected.detach(), check_dtype=False)


@pytest.mark.parametrize("normalization", ["unit_mean_square", "unit_mean_norm"])
def test_jumprelu_starts_at_the_same_selection_in_any_units(normalization):
    source = SyntheticSource(16, 32, 1, 6)
    config = AutoencoderConfig(d=16, n=48, k=3.5, architecture="jumprelu", normalization=normalization)
    sae = SparseAutoencoder(config)
    x = source.sample(500, seed=0)[0] * 7
    sae.initialize(x)
    latents = sae.encode(x)
    shares = sae.pre_activations(x) / sae.normalize(x).pow(2).sum(1).mean().sqrt()
    sure = (shares - 0.03).abs() > 1e-3
    assert torch.equal((latents != 0)[sure], (shares > 0.03)[sure])


def test_jumprelu_reaches_its_l0_in_a_short_training():
    """The published constants, in the units they are for, are at twice k then."""
    source = SyntheticSource(16, 32, 1, 6)
    held = [source.sample(2000, seed=5)[0]]
    train = TrainConfig(steps=300, batch_size=64, lr=5e-3, device="cpu")
    published = JumpReLUConfig(0.001, 0.001, sparsity_weight=1.0, sparsity_warmup_steps=2000)
    found = {}
    for name, section in (("ours", JumpReLUConfig()), ("published", published)):
        config = AutoencoderConfig(n=48, k=3.5, architecture="jumprelu", jumprelu=section)
        sae = Trainer(config, train, progress=False).fit(source)
        found[name] = evaluate(sae, held)["l0"]["mean"]
    assert found["ours"] == pytest.approx(3.5, abs=0.35)
    assert found["published"] > 4.5


def test_relu_penalises_latents_by_the_length_of_their_decoder_rows():
    sae = autoencoder(architecture="relu")
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, N)[:, None])
    x = samples()
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    out = sae(x, HARD)
    torch.testing.assert_close(out.latents, a)
    torch.testing.assert_close(out.losses["l1"], (a * sae.W_dec.norm(dim=1)).sum(1).mean())


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_the_l1_penalty_weighs_the_same_in_any_units(architecture):
    """Of the whole loss over the mean |x|^2, at the same weights in two normalisations."""
    x, shares = samples(50) + 1, []
    for normalization in ("unit_mean_norm", "unit_mean_square"):
        sae = SparseAutoencoder(
            AutoencoderConfig(d=D, n=N, k=5.0, architecture=architecture, normalization=normalization)
        )
        sae.initialize(x)
        norm = square_norm(sae.config)
        assert sae.normalize(x).pow(2).sum(1).mean().item() == pytest.approx(norm, rel=1e-5)
        weights = sae.selector.loss_weights(TrainConfig(), norm, 10**6)
        terms = sae(x, HARD._replace(step=0)).losses
        shares.append(sum(weights.get(name, 1.0) * term.item() for name, term in terms.items()) / norm)
    assert weights["l1"] == pytest.approx(0.1 * D**0.5)
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)


def test_gated_learns_its_gates_by_a_reconstruction_that_spares_the_decoder():
    sae = autoencoder(architecture="gated")
    with torch.no_grad():
        sae.selector.r.uniform_(-0.5, 0.5)
        sae.selector.b_m.uniform_(-0.1, 0.1)
    x = samples()
    direction = (x - sae.b_dec) @ sae.W_enc.T
    gate, magnitude = direction + sae.b_enc, sae.selector.r.exp() * direction + sae.selector.b_m
    out = sae(x, HARD._replace(step=0))
    torch.testing.assert_close(out.latents, (gate > 0) * torch.relu(magnitude), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.losses["l1"], torch.relu(gate).sum(1).mean(), rtol=1e-5, atol=1e-6)
    through = torch.relu(gate) @ sae.W_dec + sae.b_dec
    auxiliary = out.losses["gate_reconstruction"]
    torch.testing.assert_close(auxiliary, (x - through).pow(2).sum(1).mean())
    auxiliary.backward()
    assert sae.W_dec.grad is None and sae.W_enc.grad.abs().sum() > 0
    assert set(sae(x).losses) == {"reconstruction"}  # at inference nothing else


def test_feature_choice_keeps_the_largest_of_each_latent():
    sae = autoencoder(architecture="featurechoice", k=9.0)  # two samples a latent
    x = samples()
    a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    expected = keep_largest(a.T.contiguous(), [2] * N).T
    out = sae(x, HARD._replace(step=0))
    torch.testing.assert_close(out.latents.detach(), expected, rtol=1e-5, atol=1e-6)
    smallest = torch.where(expected > 0, expected, torch.inf).amin(0)
    torch.testing.assert_close(sae.selector.threshold, smallest, rtol=1e-5, atol=1e-6)
    assert torch.equal(sae.encode(x) != 0, a > sae.selector.threshold)


def test_msae_averages_the_reconstructions_of_every_k():
    for ks, weighting, weights in (
        ([5, 10, 20, 40], "uniform", [1, 1, 1, 1]),  # what None is for k = 5 of 40
        ([1, 2, 5, 7], "reverse", [4, 3, 2, 1]),
        ([5], "uniform", [1]),
        ([3, 4, 5, 39], "reverse", [4, 3, 2, 1]),
    ):
        given = None if ks[-1] == N else ks
        sae = autoencoder(architecture="msae", msae=MSAEConfig(given, weighting)).double()
        assert sae.config.msae.ks == ks
        x = samples().double()
        out = sae(x, HARD._replace(step=0))
        parameters = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        found = torch.autograd.grad(out.losses["reconstruction"], parameters)
        a = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        masks = [keep_largest(a.detach(), [k] * B) != 0 for k in ks]
        each = [((a * mask) @ sae.W_dec + sae.b_dec - x).pow(2).sum(1).mean() for mask in masks]
        mean = sum(w * term for w, term in zip(weights, each, strict=True)) / sum(weights)
        torch.testing.assert_close(out.losses["reconstruction"], mean)
        for gradient, expected in zip(found, torch.autograd.grad(mean, parameters), strict=True):
            torch.testing.assert_close(gradient, expected)
        at_k = keep_largest(a.detach(), [5] * B)
        torch.testing.assert_close(out.latents.detach(), at_k)
        torch.testing.assert_close(sae.encode(x), at_k)


def test_msae_decodes_few_latents_by_their_rows_and_many_by_a_product():
    section = MSAEConfig([2, 3, 4, 60, 128])  # 2, 1 and 1 of 128 are few
    sae = autoencoder(architecture="msae", n=128, k=3.0, msae=section).double()
    x = samples().double()
    pre = sae.pre_activations(x).detach().requires_grad_()
    a = torch.relu(pre)
    ranking = sae.selector.rank(a.detach())
    assert ranking.shape == (B, 60)
    start = 0
    for end in (2, 3, 4, 60, 128):
        between = (keep_largest(a.detach(), [end] * B) != 0) & (keep_largest(a.detach(), [start] * B) == 0)
        pairs = [
            (found.detach(), *torch.autograd.grad(found.square().sum(), (pre, sae.W_dec), retain_graph=True))
            for found in (
                sae.selector.between(sae.W_dec, a, ranking, start, end),
                (a * between) @ sae.W_dec,
            )
        ]
        for found, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(found, expected)
        start = end


def test_msae_ranks_equal_activations_by_their_index():
    sae = autoencoder(architecture="msae", k=4.0, n=6, msae=MSAEConfig([2, 4]))
    a = torch.tensor([[1.0, 2.0, 2.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    assert sae.selector.rank(a).tolist() == [[1, 2, 5, 0], [5, 0, 1, 2]]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"msae": MSAEConfig([4, 8])}, r"ks=\[4, 8\] must hold k=5.0"),
        ({"msae": MSAEConfig([5, 41])}, "ks=41 must be an integer >= 1 and <= 40"),
        ({"k": 0.4}, "k=0.4 must be a number >= 0.5"),
        ({"matryoshka": [0.5, 0.5]}, "msae nests budgets: give one"),
    ],
)
def test_msae_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(architecture="msae", **fields)
    for ks in ([], [2, 2], [0, 1], [1.5], "auto"):
        with pytest.raises(ValueError, match="ks="):
            MSAEConfig(ks)
    with pytest.raises(ValueError, match="weighting='linear'"):
        MSAEConfig(weighting="linear")
