"""Loss terms against formulas written independently; AuxK's path; the dead-latent tracker."""

from __future__ import annotations

import math

import pytest
import torch

from softsae import AutoencoderConfig, SparseAutoencoder, losses
from softsae.dead import DeadLatents


def test_reconstruction_sums_over_dimensions_and_averages_over_samples():
    x, x_hat = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    assert losses.reconstruction(x, x_hat).item() == pytest.approx((4 + 10) / 2)


@pytest.mark.parametrize("k_target", [1.0, 3.0, 4.0, 40.0])
def test_budget(k_target):
    k_hat = torch.tensor([2.0, 3.0, 7.0])
    expected = math.log1p(math.exp(5 * (4 - k_target))) / 5
    assert losses.budget(k_hat, k_target, 5.0).item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("dead", [3, 20])
def test_auxk_formula(dead):
    d = 8
    error, pre, W_dec = torch.randn(5, d), torch.randn(5, dead), torch.randn(dead, d)
    z = pre.clamp(min=0)
    for row in z:  # d / 2 = 4 largest
        for index in row.argsort(descending=True)[d // 2 :]:
            row[index] = 0
    numerator = sum(((error[b] - z[b] @ W_dec) ** 2).sum() for b in range(5)) / 5
    denominator = sum(((error[b] - error.mean(0)) ** 2).sum() for b in range(5)) / 5
    assert losses.auxk(error, pre, W_dec).item() == pytest.approx((numerator / denominator).item(), rel=1e-5)


def test_auxk_reaches_the_dead_encoder_rows_and_neither_bias_nor_living_rows():
    sae = SparseAutoencoder(AutoencoderConfig(d=6, n=20, k=3, architecture="topk"))
    x = torch.randn(16, 6)
    out = sae(x)
    dead = torch.tensor([2, 11, 19])
    sae.auxk_loss(x, out.x_hat, dead).backward()
    alive = torch.ones(20, dtype=torch.bool)
    alive[dead] = False
    for gradient in (sae.W_enc.grad, sae.b_enc.grad, sae.W_dec.grad):
        assert gradient[dead].abs().amax(-1).min() > 0
        assert gradient[alive].abs().max() == 0
    assert sae.b_dec.grad is None


def test_auxk_without_error_is_finite():
    assert losses.auxk(torch.zeros(4, 6), torch.zeros(4, 2), torch.randn(2, 6)).item() == 0


def dead(listed) -> list[int]:
    return listed.indices[listed.valid].tolist()


def test_dead_latents_are_counted_in_samples():
    tracker = DeadLatents(3, dead_after=10, most=2)
    only_first, second = torch.eye(3, dtype=torch.bool)[:2]
    for _ in range(5):
        tracker.update(only_first, 2)
    assert tracker.count().item() == 0  # silent for 10, not more
    tracker.update(second, 1)
    assert tracker.silent_for.tolist() == [1, 0, 11]
    assert dead(tracker.refresh(0)) == [2]


def test_list_of_the_dead_is_renewed_only_every_refresh_steps():
    tracker = DeadLatents(2, dead_after=1, most=2)
    tracker.update(torch.zeros(2, dtype=torch.bool), 2)
    assert dead(tracker.refresh(0)) == [0, 1]
    tracker.update(torch.tensor([True, False]), 1)
    assert dead(tracker.refresh(1)) == [0, 1]
    assert dead(tracker.refresh(tracker.REFRESH)) == [1]


def test_nested_reconstruction_is_the_mean_over_prefixes():
    x, latents, W, b = (torch.randn(*shape) for shape in ((5, 6), (5, 20), (20, 6), (6,)))
    expected = [(x - latents[:, :m] @ W[:m] - b).pow(2).sum(1).mean() for m in (2, 7, 20)]
    found = losses.nested_reconstruction(x, latents, W, b, (2, 7, 20))
    torch.testing.assert_close(found, sum(expected) / 3)
