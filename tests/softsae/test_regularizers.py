"""R1 and R2 on the activations before a top-k selection, against loops over samples and latents."""

from __future__ import annotations

import json
import math

import pytest
import torch

from softsae import (
    AutoencoderConfig,
    RegularizerConfig,
    RunConfig,
    SparseAutoencoder,
    TrainConfig,
    Trainer,
    evaluate,
    losses,
)
from softsae.activations.synthetic import SyntheticSource
from softsae.architectures import ARCHITECTURES
from softsae.config import resolve
from softsae.schedules import Schedule

D, N, B = 12, 40, 9
TOP_K = [name for name, (section, _) in ARCHITECTURES.items() if section.top_k]
BOTH = RegularizerConfig(r1_weight=1.0, r2_weight=1.0)
ALL = RegularizerConfig(r1_weight=1.0, r2_weight=1.0, all_units=True)


def plain(a: torch.Tensor, kept: torch.Tensor, all_units: bool) -> tuple[list[float], list[float]]:
    """R1's sum and R2's ratio of every sample, as the paper's text has them."""
    batch, n = a.shape
    active = {i for i in range(n) if all_units or any(kept[b, i] != 0 for b in range(batch))}
    sums, ratios = [], []
    for b in range(batch):
        off = [a[b, i].item() for i in active if kept[b, i] == 0]
        l1 = math.fsum(a[b, i].item() for i in active)
        l2 = math.sqrt(math.fsum(a[b, i].item() ** 2 for i in active))
        sums.append(math.fsum(off))
        ratios.append(l1 / l2 if l2 else 0.0)
    return sums, ratios


def autoencoder(architecture: str, k: float = 3.0) -> SparseAutoencoder:
    sae = SparseAutoencoder(AutoencoderConfig(d=D, n=N, k=k, architecture=architecture), seed=1)
    with torch.no_grad():
        sae.b_enc.uniform_(-0.5, 0.1, generator=torch.Generator().manual_seed(2))
        sae.b_enc[:10] = -20.0  # never selected: outside A
    return sae


def samples(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def phase_of(sae: SparseAutoencoder, regularizer: RegularizerConfig | None, hard: bool = True):
    return sae.inference_phase(hard)._replace(step=0, regularizer=regularizer)


@pytest.mark.parametrize("regularizer", [BOTH, ALL], ids=["batch-active", "all units"])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("architecture", TOP_K)
def test_values_are_the_formulas_with_every_top_k_selector(architecture, hard, regularizer):
    sae, x = autoencoder(architecture), samples()
    a = torch.relu(sae.pre_activations(x)).detach()
    out = sae(x, phase_of(sae, regularizer, hard))
    off, ratios = plain(a, out.latents, regularizer.all_units)
    assert out.losses["r1"].item() == pytest.approx(sum(off) / B, rel=1e-5)
    assert out.losses["r2"].item() == pytest.approx(sum(ratios) / B, rel=1e-5)
    plainly = sae(x, phase_of(sae, None, hard))
    assert torch.equal(out.latents, plainly.latents)  # the penalties change no value
    assert not {"r1", "r2"} & plainly.losses.keys()


def test_batch_active_units_are_fewer_than_all():
    sae, x = autoencoder("topk"), samples()
    some, every = (sae(x, phase_of(sae, r)).losses for r in (BOTH, ALL))
    assert 0 < some["r1"] < every["r1"] and some["r2"] < every["r2"]


def test_r1_as_a_mean_counts_the_units_of_the_whole_batch():
    a = torch.tensor([[3.0, 1.0, 2.0, 5.0], [4.0, 6.0, 0.0, 7.0]])
    latents = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0]])  # A = {0, 1}: off are 1.0, 4.0
    for reduction, expected in (("sum", 5 / 2), ("mean", 5 / 2)):
        config = RegularizerConfig(r1_weight=1.0, r1_reduction=reduction)
        assert losses.regularizers(a, latents, config)["r1"].item() == expected
    whole = RegularizerConfig(r1_weight=1.0, r1_reduction="mean", all_units=True)
    assert losses.regularizers(a, latents, whole)["r1"].item() == pytest.approx((1 + 2 + 5 + 4 + 0 + 7) / 6)
    nothing_off = RegularizerConfig(r1_weight=1.0, r1_reduction="mean")
    assert losses.regularizers(a, a + 1, nothing_off)["r1"].item() == 0


@pytest.mark.parametrize("architecture", TOP_K)
def test_gradients_reach_encoder_and_bias_through_the_activations_alone(architecture):
    sae, x = autoencoder(architecture).double(), samples().double()
    out = sae(x, phase_of(sae, BOTH))
    kept = out.latents.detach() != 0
    units = kept.any(0)
    (out.losses["r1"] + 2 * out.losses["r2"]).backward()
    W, b = (p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc))
    a = torch.relu(x @ W.T + b)
    r1 = (a * (units & ~kept)).sum() / B
    in_A = a * units
    (r1 + 2 * (in_A.sum(1) / in_A.norm(dim=1)).mean()).backward()
    torch.testing.assert_close(sae.W_enc.grad, W.grad)
    torch.testing.assert_close(sae.b_enc.grad, b.grad)
    assert b.grad[units].abs().min() > 0 and not b.grad[~units].any()
    assert sae.W_dec.grad is None
    assert all(p.grad is None or not p.grad.any() for p in sae.selector.parameters())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e-8, 1.0, 1e15])
def test_rows_of_zeros_and_rows_near_them_have_finite_gradients(scale):
    a = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 0.0, 1.0]])
    a[1] *= scale
    a.requires_grad_()
    terms = losses.regularizers(a, a.detach(), ALL)
    terms["r2"].backward()
    assert a.grad.isfinite().all() and not a.grad[0].any()
    ratio = 8 / math.sqrt(26) / 2
    assert terms["r2"].item() == pytest.approx(ratio if scale >= 1 else 0.0, rel=1e-6)


def test_r2_does_not_depend_on_the_scale_of_the_activations():
    a = torch.rand(B, N)
    one, other = (losses.l1_over_l2(s * a, torch.ones(N, dtype=torch.bool)) for s in (1.0, 100.0))
    torch.testing.assert_close(one, other)


def test_nothing_selected_and_bfloat16_activations():
    nothing = losses.regularizers(torch.zeros(B, N), torch.zeros(B, N), BOTH)
    assert nothing["r1"] == 0 and nothing["r2"] == 0
    a = torch.rand(64, 3000).bfloat16()
    kept = a * (a > 0.5)
    low, exact = (losses.regularizers(t, kept.to(t.dtype), ALL) for t in (a, a.double()))
    for name in ("r1", "r2"):
        assert low[name].dtype == torch.float32
        assert low[name].item() == pytest.approx(exact[name].item(), rel=1e-3)  # no bfloat16 sum


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
@pytest.mark.parametrize("weight", ["r1_weight", "r2_weight"])
def test_rules_that_are_no_top_k_are_refused(architecture, weight):
    train = TrainConfig(regularizer=RegularizerConfig(**{weight: 0.1}))
    with pytest.raises(ValueError, match=f"{weight}=0.1.* need a top-k .* is '{architecture}'"):
        resolve(RunConfig(AutoencoderConfig(architecture=architecture), train), D)
    resolve(RunConfig(AutoencoderConfig(architecture=architecture), TrainConfig()), D)


@pytest.mark.parametrize(
    "fields", [{"r1_weight": -1.0}, {"r2_weight": float("nan")}, {"r1_reduction": "max"}, {"all_units": 1}]
)
def test_fields(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"regularizer.{name}={value!r}"):
        RegularizerConfig(**fields)


def test_the_published_hard_phase_leaves_the_encoder_alone():
    sae = autoencoder("softsae")
    out = sae(samples(), phase_of(sae, BOTH)._replace(learns="decoder"))
    sum(out.losses.values()).backward()
    assert sae.W_enc.grad is None and sae.W_dec.grad is not None and out.losses["r1"] > 0


def test_weights_follow_the_units_of_their_terms_and_unwanted_terms_are_left_out():
    assert RegularizerConfig(r1_weight=0.5).weights(100.0) == {"r1": 5.0}
    assert RegularizerConfig(r2_weight=0.5).weights(100.0) == {"r2": 50.0}
    config = resolve(RunConfig(AutoencoderConfig(architecture="topk"), TrainConfig()), D)
    assert Schedule(config).phase(0).regularizer is None


def test_training_with_r1_leaves_less_off_the_support(tmp_path):
    source = SyntheticSource(16, 32, 1, 6)
    x = source.sample(2000, seed=7)[0]
    found = {}
    for weight in (0.0, 1.2):
        both = RegularizerConfig(r1_weight=weight, r2_weight=weight / 40)
        train = TrainConfig(steps=100, batch_size=64, lr=5e-3, log_every=50, device="cpu", regularizer=both)
        out = tmp_path / str(weight)
        model = AutoencoderConfig(n=48, k=4, architecture="topk")
        sae = Trainer(model, train, out=out, progress=False).fit(source)
        logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert ("loss_r1" in logged[-1] and "loss_r2" in logged[-1]) == (weight > 0)
        if weight:
            last = logged[-1]
            total = last["loss_reconstruction"] + 4 * 1.2 * last["loss_r1"] + 16 * 0.03 * last["loss_r2"]
            total += last.get("loss_auxk", 0) * 16 / 32
            assert last["loss"] == pytest.approx(total, rel=1e-5)
        with torch.no_grad():
            a, kept = torch.relu(sae.pre_activations(x)), sae.encode(x)
        found[weight] = ((a.sum() - kept.sum()) / a.sum()).item(), evaluate(sae, [x])["explained_variance"]
    assert found[1.2][0] < 0.5 * found[0.0][0]
    assert found[1.2][1] > 0.5


def test_no_dense_copy_is_kept_for_the_gradient():
    a = torch.rand(B, N, requires_grad=True) * 1  # no leaf
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        terms = losses.regularizers(a, a.detach() * (a > 0.8), BOTH)
    dense = [t for t in kept if t.numel() >= B * N and t.is_floating_point()]
    assert dense and {t.data_ptr() for t in dense} == {a.data_ptr()}
    assert set(terms) == {"r1", "r2"}
