"""The float64 reference, anchored: 60-digit bisection and the textbook formulas on small rows."""

from __future__ import annotations

import mpmath
import pytest
import torch

from softtopk.backends import reference
from tests.accuracy import LOG_FORMS
from tests.cases import gapped, make


def exact(x: list[float], k: float, alpha: float, v: list[float], form: str = "p"):
    """p (or its log form), grad_x, grad_k, grad_alpha of one row from the definition, by bisection for b;
    for the log forms also the scales of grad_k and grad_alpha, sum |g| / R and sum |g| (1 + |t|) / alpha.
    """
    with mpmath.workdps(60):
        x, v = [mpmath.mpf(a) for a in x], [mpmath.mpf(a) for a in v]
        k, alpha = mpmath.mpf(k), mpmath.mpf(alpha)

        def cdf(t):
            return mpmath.exp(t) / 2 if t <= 0 else 1 - mpmath.exp(-t) / 2

        def excess(b):  # S(b) - k with the whole units summed apart: exact also in a gap
            tails = sum(mpmath.sign(b - a) * mpmath.exp(-abs(a - b) / alpha) / 2 for a in x if a != b)
            return sum(1 if a > b else mpmath.mpf(0.5) if a == b else 0 for a in x) - k + tails

        low, high = min(x) - 2000 * alpha, max(x) + 2000 * alpha
        for _ in range(260):
            b = (low + high) / 2
            low, high = (b, high) if excess(b) > 0 else (low, b)
        t = [(a - b) / alpha for a in x]
        h = [mpmath.exp(-abs(a)) / 2 for a in t]
        q = [a / sum(h) for a in h]
        mean_v = sum(a * c for a, c in zip(q, v, strict=True))
        mean_t = sum(a * c for a, c in zip(q, t, strict=True))
        if form != "p":
            sign = 1 if form == "log" else -1
            w = [cdf(sign * a) for a in t]
            # log1p, as 1 - h rounds to 1 even with 60 digits
            y = [mpmath.log(a) if a < 0.5 else mpmath.log1p(-b) for a, b in zip(w, h, strict=True)]
            g = [sign * b / a * c for a, b, c in zip(w, h, v, strict=True)]
            grad_x = [(a - b * sum(g)) / alpha for a, b in zip(g, q, strict=True)]
            grad_alpha = -sum(a * (c - mean_t) for a, c in zip(g, t, strict=True)) / alpha
            size = [abs(a) for a in g]
            scale_alpha = sum(a * (1 + abs(c)) for a, c in zip(size, t, strict=True)) / alpha
            numbers = (sum(g) / sum(h), grad_alpha, sum(size) / sum(h), scale_alpha)
            return [float(a) for a in y], [float(a) for a in grad_x], *map(float, numbers)
        grad_x = [a / alpha * (c - mean_v) for a, c in zip(h, v, strict=True)]
        grad_alpha = -sum(a / alpha * (c - mean_t) * w for a, c, w in zip(h, t, v, strict=True))
        p = [cdf(a) for a in t]
        return [float(a) for a in p], [float(a) for a in grad_x], float(mean_v), float(grad_alpha)


ROWS = [
    *[(family, k, alpha) for family in ("normal", "relu", "tied", "offset") for k in (0.5, 3, 4.25, 11.5)
      for alpha in (1.0, 1e-2, 1e-4)],
]  # fmt: skip


def check(x: torch.Tensor, k: float, alpha: float):
    n = x.shape[1]
    v = torch.randn(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p, solution = reference.soft_topk_forward(x, k, alpha)
    grad_x, grad_k, grad_alpha = reference.soft_topk_backward(x, solution, alpha, v)
    want_p, want_x, want_k, want_alpha = exact(x[0].tolist(), k, alpha, v[0].tolist())
    ulp = 4 * torch.finfo(torch.float64).eps * x.abs().max().item() / alpha
    torch.testing.assert_close(p[0].tolist(), want_p, rtol=0, atol=1e-14 + ulp)
    scale = max(1e-30 / alpha, *(abs(g) for g in want_x))
    torch.testing.assert_close(grad_x[0].tolist(), want_x, rtol=0, atol=(1e-12 + ulp) * scale)
    assert grad_k.item() == pytest.approx(want_k, rel=0, abs=(1e-13 + ulp) * v.abs().max().item())
    weight = (p * (1 - p)).sum().item() * 40 / alpha
    assert grad_alpha.item() == pytest.approx(want_alpha, rel=1e-11, abs=(1e-12 + ulp) * weight)


@pytest.mark.parametrize("family,k,alpha", ROWS)
def test_small_rows(family, k, alpha):
    check(make(family, 1, 12, seed=3).double(), k, alpha)


@pytest.mark.parametrize("gap", [10, 100, 1000, 1e6])
@pytest.mark.parametrize("alpha", [1.0, 1e-4])
def test_integer_k_in_a_gap(gap, alpha):
    check(gapped(gap, alpha, 5, 14).double(), 5.0, alpha)


def check_log(x: torch.Tensor, k: float, alpha: float, form: str):
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, solution = reference.soft_topk_forward(x, k, alpha, form=form)
    grad_x, grad_k, grad_alpha = reference.soft_topk_backward(x, solution, alpha, v, form=form)
    want, want_x, want_k, want_alpha, scale_k, scale_alpha = exact(
        x[0].tolist(), k, alpha, v[0].tolist(), form
    )
    tolerance = 1e-12 + 4 * torch.finfo(torch.float64).eps * x.abs().max().item() / alpha
    torch.testing.assert_close(y[0].tolist(), want, rtol=tolerance, atol=1e-300)
    scale = max(1e-30 / alpha, *(abs(g) for g in want_x))
    torch.testing.assert_close(grad_x[0].tolist(), want_x, rtol=0, atol=tolerance * scale)
    # Both are infinite where R is below the smallest float64.
    error_k = 0 if grad_k.item() == want_k else abs(grad_k.item() - want_k)
    assert error_k <= tolerance * max(v.abs().max().item(), min(scale_k, 1e308))
    assert abs(grad_alpha.item() - want_alpha) <= tolerance * max(scale_alpha, 1e-30 / alpha)


@pytest.mark.parametrize("form", LOG_FORMS)
@pytest.mark.parametrize("family,k,alpha", ROWS)
def test_small_rows_in_the_log_domain(family, k, alpha, form):
    check_log(make(family, 1, 12, seed=3).double(), k, alpha, form)


@pytest.mark.parametrize("form", LOG_FORMS)
@pytest.mark.parametrize("gap", [10, 100, 1000, 1e6])
@pytest.mark.parametrize("alpha", [1.0, 1e-4])
def test_integer_k_in_a_gap_in_the_log_domain(gap, alpha, form):
    """At 1e6 alpha h is exp(-5e5)."""
    check_log(gapped(gap, alpha, 5, 14).double(), 5.0, alpha, form)
