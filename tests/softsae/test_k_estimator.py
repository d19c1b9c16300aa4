"""The k estimator against its formula, its start, its clamp and its precision."""

from __future__ import annotations

import pytest
import torch

from softsae import EstimatorConfig
from softsae.config import resolve_autoencoder
from softsae.k_estimator import KEstimator
from tests.softsae.configs import model


def estimator(mode="corrected", kind="wide", **fields) -> tuple[KEstimator, torch.Tensor]:
    config = model(**{"d": 6, "n": 30, "k": 4.0, **fields}, estimator=EstimatorConfig(kind, 5))
    module = KEstimator(resolve_autoencoder(config, mode))
    W_enc = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    module.initialize(W_enc, torch.Generator().manual_seed(1))
    return module, W_enc


@pytest.mark.parametrize("kind, hidden", [("wide", 30), ("bottleneck", 5)])
def test_formula(kind, hidden):
    module, W_enc = estimator(kind=kind, k_max=11.0)
    with torch.no_grad():
        module.c.uniform_(-1, 1)
        module.w2.uniform_(-1, 1)
    x, b_dec = torch.randn(7, 6), torch.randn(6)
    expected = []
    module.requires_grad_(False)
    for row in x:
        h = [max(0.0, float(module.W[j] @ (row - b_dec) + module.c[j])) for j in range(hidden)]
        score = sum(h[j] * float(module.w2[j]) for j in range(hidden)) + float(module.c2)
        expected.append(min(30.0, max(1.0, 11 / (1 + torch.exp(torch.tensor(-score)).item()))))
    torch.testing.assert_close(module(x, b_dec), torch.tensor(expected))
    assert module.W.shape == (hidden, 6)
    assert torch.equal(module.W, W_enc) == (kind == "wide")


def test_training_starts_at_the_target():
    module, _ = estimator(k=4.0, k_max=16.0)
    with torch.no_grad():
        module.w2.zero_()
    torch.testing.assert_close(module(torch.randn(3, 6), torch.zeros(6)), torch.full((3,), 4.0))


def test_clamped_to_k_min_and_default_k_max_is_twice_k():
    module, _ = estimator(k_min=3.0)
    with torch.no_grad():
        module.w2.zero_()
        for bias, k in ((-20.0, 3.0), (20.0, 8.0)):
            module.c2.fill_(bias)
            assert module(torch.randn(1, 6), torch.zeros(6)).item() == pytest.approx(k)


def test_gradient_to_b_dec_as_configured():
    for mode, moves in (("corrected", False), ("published", True)):
        module, _ = estimator(mode)
        x, b_dec = torch.randn(7, 6), torch.randn(6, requires_grad=True)
        k_hat = module(x, b_dec)
        (gradient,) = torch.autograd.grad(k_hat.sum(), b_dec, allow_unused=True)
        assert (gradient is not None) == moves
        if moves:
            x.requires_grad_()
            (to_x,) = torch.autograd.grad(module(x, b_dec).sum(), x)
            torch.testing.assert_close(gradient, -to_x.sum(0), rtol=1e-2, atol=1e-3)


def test_float32_under_autocast_and_bfloat16_as_published():
    x, b_dec = torch.randn(200, 6), torch.zeros(6)
    for mode, quantised in (("corrected", False), ("published", True)):
        module, _ = estimator(mode)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            k_hat = module(x, b_dec)
        assert k_hat.dtype == torch.float32
        assert torch.equal(k_hat, k_hat.bfloat16().float()) == quantised
