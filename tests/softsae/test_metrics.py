"""The streaming metrics against direct computation on all samples at once."""

from __future__ import annotations

import math

import pytest
import torch

from softsae import AutoencoderConfig, SparseAutoencoder, evaluate
from softsae.metrics import dictionary_recovery, distribution, explained_variance, rank_correlation


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    sae = SparseAutoencoder(AutoencoderConfig(d=6, n=40, k=5.0), seed=1).train()
    with torch.no_grad():
        sae.selector.estimator.w2.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(1))
        sae.b_dec.fill_(40.0)
        sae.b_enc[:3] = -100.0  # dead
        sae.b_enc[3] = 100.0  # dense
    return sae


def test_against_direct_computation(sae):
    x = torch.randn(500, 6, dtype=torch.float64).float() * 3 + 40  # mean far above the spread
    x[:100] -= 5  # batches of different means
    with torch.no_grad():
        out = sae(x)
    result = evaluate(sae, x.split(70))
    assert sae.training
    x, x_hat = x.double(), out.x_hat.double()
    total = (x - x.mean(0)).pow(2).sum()
    active = out.latents != 0
    l0 = active.sum(1).double()
    expected = {
        "samples": 500,
        "explained_variance": 1 - ((x - x_hat) ** 2).sum() / total,
        "mean_squared_error": ((x - x_hat) ** 2).sum() / 500,
        "cosine": torch.nn.functional.cosine_similarity(x, x_hat).mean(),
        "relative_reconstruction_bias": (x_hat**2).sum() / (x * x_hat).sum(),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(float(value), rel=1e-6), name
    assert result["l0"]["mean"] == pytest.approx(l0.mean().item())
    assert result["l0"]["sd"] == pytest.approx(l0.std(correction=0).item())
    counts = {str(v): int((l0 == v).sum()) for v in sorted(set(l0.int().tolist()))}
    assert result["l0"]["histogram"] == counts and len(counts) > 1
    assert result["dead_latents"] == (active.sum(0) == 0).sum() >= 3
    assert result["dense_latents"] == (active.double().mean(0) > 0.1).sum() >= 1
    assert result["k_hat"]["max"] == out.k_hat.max()


def test_predicting_the_mean_explains_nothing_and_x_explains_all():
    x = torch.randn(50, 3) + 9
    assert explained_variance(x, x.mean(0).expand_as(x)).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(x, x).item() == 1


def test_limit_and_no_samples(sae):
    endless = iter(lambda: torch.randn(8, 6), None)
    assert evaluate(sae, endless, limit=3)["samples"] == 24
    with pytest.raises(ValueError, match="no samples"):
        evaluate(sae, [])


def test_distribution():
    result = distribution(torch.arange(101))
    assert (result["mean"], result["min"], result["max"]) == (50, 0, 100)
    assert result["quantiles"] == {"0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95}
    assert result["histogram"]["7"] == 1


def test_rank_correlation_averages_ties():
    a, b = torch.tensor([1.0, 2, 2, 3]), torch.tensor([10, 30, 20, 40])
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4; Pearson: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation(a, b) == pytest.approx(4.5 / math.sqrt(22.5))
    assert rank_correlation(b, -b.float().exp2()) == pytest.approx(-1)
    assert math.isnan(rank_correlation(torch.ones(3), torch.arange(3)))


def test_dictionary_recovery_ignores_order_and_length():
    directions = torch.eye(4)
    assert dictionary_recovery(torch.eye(4).flip(0) * 7, directions) == pytest.approx(1)
    assert dictionary_recovery(torch.eye(4)[:3], directions) == pytest.approx(0.75)
