"""Hard inference at a k that the user gives, for every architecture."""

from __future__ import annotations

import math

import pytest
import torch

from softsae import SparseAutoencoder, evaluate
from softsae.architectures import ARCHITECTURES
from tests.softsae.configs import model

D, N, B = 12, 40, 6
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def autoencoder(architecture: str = "topk") -> SparseAutoencoder:
    sae = SparseAutoencoder(model(d=D, n=N, k=5.0, architecture=architecture), seed=1)
    with torch.no_grad():
        sae.b_enc.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(2))
        if architecture == "jumprelu":
            sae.selector.threshold.fill_(0.5)
        if architecture == "gated":
            sae.selector.r.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3))
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(0))


def to_choose_from(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """relu(pre) of rules that rank; what rules that decide on each latent by itself keep."""
    pre = sae.pre_activations(x).detach()
    if sae.config.architecture == "jumprelu":
        return pre * (pre > 0.5)
    if sae.config.architecture == "gated":
        return (pre > 0) * torch.relu(sae.selector.r.exp() * (pre - sae.b_enc)).detach()
    return torch.relu(pre)


def largest(a: torch.Tensor, ks: list[float]) -> torch.Tensor:
    kept = torch.zeros_like(a)
    for row, k in enumerate(ks):
        for i in sorted(range(a.shape[1]), key=lambda i: (-a[row, i].item(), i))[: math.floor(k + 0.5)]:
            kept[row, i] = a[row, i]
    return kept


@EVERY
@pytest.mark.parametrize("k", [0, 1, 2.5, 7.0, N])
def test_the_k_largest_are_kept(architecture, k, x):
    sae = autoencoder(architecture)
    expected = largest(to_choose_from(sae, x), [k] * B)
    torch.testing.assert_close(sae.encode(x, k=k), expected)
    out = sae(x, k=k)
    torch.testing.assert_close(out.latents, expected)
    torch.testing.assert_close(out.x_hat, sae.decode(expected))
    assert out.k_hat.tolist() == [math.floor(k + 0.5)] * B
    assert out.losses.keys() == {"reconstruction"}
    error = (out.x_hat - x).pow(2).sum(1).mean()
    torch.testing.assert_close(out.losses["reconstruction"], error)


@EVERY
def test_a_tensor_gives_every_sample_its_own(architecture, x):
    sae = autoencoder(architecture)
    a = to_choose_from(sae, x)
    for ks in (torch.tensor([0, 1, 2, 3, 4, 40]), torch.tensor([0.4, 0.5, 1.5, 2.6, 9.0, 40.0])):
        torch.testing.assert_close(sae.encode(x, k=ks), largest(a, ks.tolist()))
    nested = x.reshape(2, 3, D)
    for k, rows in (
        (torch.tensor([1.0, 2.0, 3.0]), [1, 2, 3, 1, 2, 3]),
        (torch.tensor([[4], [5]]), [4, 4, 4, 5, 5, 5]),
        (torch.tensor(6.0), [6] * 6),
    ):
        out = sae(nested, k=k)
        assert out.k_hat.flatten().tolist() == rows and out.k_hat.shape == (2, 3)
        torch.testing.assert_close(out.latents.reshape(B, N), largest(a, rows))


@EVERY
def test_the_support_of_a_smaller_k_is_within_that_of_a_larger(architecture, x):
    sae = autoencoder(architecture)
    supports = [sae.encode(x, k=k) != 0 for k in range(N + 1)]
    assert all(not (small & ~large).any() for small, large in zip(supports, supports[1:], strict=False))
    assert not supports[0].any() and supports[-1].sum() > B


def test_latents_at_the_rules_own_k_are_the_rules(x):
    for architecture in ("topk", "msae"):
        sae = autoencoder(architecture)
        assert torch.equal(sae.encode(x, k=5), sae.encode(x))
    sae = autoencoder("softsae")
    assert torch.equal(sae.encode(x, k=sae(x).k_hat), sae.encode(x))


def test_shapes_without_samples_and_of_one_sample(x):
    sae = autoencoder()
    assert sae.encode(torch.zeros(2, 0, D), k=3).shape == (2, 0, N)
    assert (sae.encode(x[0], k=3) != 0).sum() == 3 == sae(x[0], k=torch.tensor(3)).k_hat


def test_gradients_go_through_the_kept_values(x):
    sae = autoencoder("softsae")
    sae(x, k=4).losses["reconstruction"].backward()
    assert sae.W_enc.grad.abs().sum() > 0
    assert all(p.grad is None for p in sae.selector.parameters())


def test_a_tensor_out_of_range_is_clamped_and_nan_stays_in_its_row(x):
    sae = autoencoder()
    found = sae.encode(x, k=torch.tensor([-3.0, 99.0, 2.0, torch.nan, torch.inf, 2.0]))
    assert found[3].isnan().all()
    good = [0, 1, 2, 4, 5]
    expected = largest(to_choose_from(sae, x)[good], [0, N, 2, N, 2])
    torch.testing.assert_close(found[good], expected)


@pytest.mark.parametrize(
    "k, error, message",
    [
        (-1, ValueError, r"k=-1 must be a number >= 0 and <= 40"),
        (41, ValueError, "k=41 must be a number >= 0 and <= 40"),
        (math.nan, ValueError, "k=nan"),
        (math.inf, ValueError, "k=inf"),
        (True, ValueError, "k=True"),
        ("5", ValueError, "k='5'"),
        (torch.ones(B, 1), ValueError, r"k of shape \(6, 1\) must broadcast to \(6,\), x without d"),
        (torch.ones(4), ValueError, r"k of shape \(4,\) must broadcast to \(6,\)"),
        (torch.ones(B, dtype=torch.bool), TypeError, "dtype torch.bool"),
        (torch.ones(B, device="meta"), ValueError, "k is on meta, the autoencoder on cpu"),
    ],
)
def test_what_is_no_budget_is_refused(k, error, message, x):
    for method in ("__call__", "encode"):
        with pytest.raises(error, match=message):
            getattr(autoencoder(), method)(x, k=k)


def test_k_belongs_to_hard_inference(x):
    sae = autoencoder()
    with pytest.raises(ValueError, match="k=3 has a meaning at inference only"):
        sae(x, sae.inference_phase(True), k=3)
    with pytest.raises(ValueError, match="k=3 is a hard selection"):
        sae.encode(x, hard=False, k=3)


def test_evaluation_at_k(x):
    sae = autoencoder("batchtopk")  # its own threshold, not known yet, keeps none
    assert evaluate(sae, [x])["l0"]["mean"] == 0
    found = evaluate(sae, [x], k=3)
    assert found["l0"] == {**found["l0"], "min": 3.0, "max": 3.0} and found["k_hat"]["mean"] == 3
    assert found["mean_squared_error"] == pytest.approx((sae(x, k=3).x_hat - x).pow(2).sum(1).mean().item())
