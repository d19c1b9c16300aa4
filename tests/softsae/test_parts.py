"""Dense steps in parts of their batch against whole ones: passes, whole trainings, which rules have them."""

from __future__ import annotations

import pytest
import torch

from softsae import AutoencoderConfig, EstimatorConfig, SoftSAEConfig, SparseAutoencoder, TrainConfig
from softsae import config as configuration
from softsae.config import RegularizerConfig
from softsae.parts import derive, in_parts, rows_at_a_time, whole
from softsae.schedules import Phase
from softsae.step import weighted
from tests.softsae.sparse_cases import ALPHA, CASES, SOURCE, D, Exactly, K, N, midway, records

WEIGHTS = {"reconstruction": 0.7, "budget": 3.0}
BY_ROWS = [
    *("topk", "softsae-wide", "softsae-bottleneck-all", "softsae-constant", "softsae-published"),
    *("softsae-linear", "transcoder"),
]
PHASES = {
    "soft": {"hard": False},
    "hard": {"hard": True},
    "frozen": {"hard": True, "learns": "frozen_estimator"},
    "decoder": {"hard": True, "learns": "decoder"},
}


def autoencoder(name: str) -> SparseAutoencoder:
    if name == "softsae-linear":
        options = SoftSAEConfig(alpha=ALPHA, estimator=EstimatorConfig("linear", moves_b_dec=True))
        model = AutoencoderConfig(n=N, k=K, softsae=options)
    else:
        model = CASES["softsae-wide" if name == "transcoder" else name][0]
    train = TrainConfig(**CASES[name][1]) if name in CASES else TrainConfig()
    run = configuration.RunConfig(model, train)
    d_out = 24 if name == "transcoder" else None
    return midway(SparseAutoencoder(configuration.resolve(run, D, d_out).autoencoder, seed=3))


def derived(sae: SparseAutoencoder, passed):
    """The pass and the gradients that there are."""
    derive(weighted(passed.losses, WEIGHTS), passed.pending)
    return passed, {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [48, 20, 1])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", BY_ROWS)
def test_a_pass_in_parts_is_the_whole_one(name, phase, rows):
    sae = autoencoder(name)
    moment = Phase(ALPHA, 8.0, **{"step": 40, **PHASES[phase]})
    x = SOURCE.sample(48, seed=2)[0].double()
    target = torch.randn(48, 24, dtype=torch.float64) if name == "transcoder" else None
    want, gradients = derived(sae, whole(sae, x, target, moment, None))
    sae.zero_grad(set_to_none=True)
    got, found = derived(sae, in_parts(sae, x, target, moment, WEIGHTS, rows, torch.float64))
    torch.testing.assert_close(got.reconstruction, want.reconstruction)
    torch.testing.assert_close(got.k_hat, want.k_hat)
    assert got.losses.keys() == want.losses.keys() and got.overflow is None
    for term, value in want.losses.items():
        torch.testing.assert_close(got.losses[term], value)
    for ours, theirs in zip(got.activity, want.activity, strict=True):
        assert torch.equal(ours, theirs)
    assert found.keys() == gradients.keys()
    assert ("W_enc" in found) == (phase != "decoder" or name == "topk")
    for parameter, gradient in gradients.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=float(1e-10 * scale + 1e-14))


@pytest.mark.parametrize("name", ["topk", "softsae-wide", "softsae-bottleneck-all", "softsae-published"])
def test_a_training_in_parts_is_the_whole_one(name):
    """With AuxK, clip, projection and a hard phase, in float64."""
    one, together = records(name, Exactly, path="dense", rows_at_a_time=64)
    other, apart = records(name, Exactly, path="dense", rows_at_a_time=20)
    assert any("loss_auxk" in record for record in together)
    for found, expected in zip(apart, together, strict=True):
        assert found.keys() == expected.keys()
        for key in ("loss", "l0", "grad_norm", "k_hat_mean", "explained_variance", "dead_latents"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (found["step"], key)
    for parameter, ours in zip(one.sae.parameters(), other.sae.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["topk", "softsae-wide"])
def test_products_in_bfloat16(name):
    """Gradients of parts are added up in float32."""
    _, together = records(name, path="dense", dtype="bfloat16", rows_at_a_time=64)
    run, apart = records(name, path="dense", dtype="bfloat16", rows_at_a_time=8)
    assert all(parameter.grad.dtype == torch.float32 for parameter in run.sae.parameters())
    for found, expected in zip(apart[:3], together[:3], strict=True):
        for key in ("loss", "grad_norm", "k_hat_mean"):
            assert found[key] == pytest.approx(expected[key], rel=0.03), key
    last = "loss_reconstruction"
    assert apart[-1][last] == pytest.approx(together[-1][last], rel=0.1)


def test_rules_that_need_the_whole_batch_get_it():
    phase = Phase(ALPHA, 8.0, False, step=1)
    for name, (model, train) in CASES.items():
        run = configuration.RunConfig(model, TrainConfig(**train))
        sae = SparseAutoencoder(configuration.resolve(run, D).autoencoder)
        rows = rows_at_a_time(sae, phase, 48, torch.float32, 16)
        assert rows == (16 if name in BY_ROWS else 48), name
    sae = SparseAutoencoder(AutoencoderConfig(d=D, n=N, k=K, architecture="topk"))
    regularized = phase._replace(regularizer=RegularizerConfig(r1_weight=1.0))
    assert rows_at_a_time(sae, regularized, 48, torch.float32, 16) == 48
    assert rows_at_a_time(sae, phase, 48, torch.float32, 17) == 16  # parts are as equal as may be
    assert rows_at_a_time(sae, phase, 48, torch.float32, 64) == 48
    for samples in (1, 100, 8192, 100_000):
        rows = rows_at_a_time(sae, phase, samples, torch.bfloat16, None)
        assert rows <= samples and rows * N * 2 <= 16 << 20
    with pytest.raises(ValueError, match="rows_at_a_time"):
        TrainConfig(rows_at_a_time=0)
