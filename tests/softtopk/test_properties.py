"""Properties of the operator, searched by hypothesis on the backends that run here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softtopk import soft_topk

FAST = ["reference", "cpu"]
SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw):
    """A float64 row of moderate values with ties, a budget inside (0, n), a scale."""
    n = draw(st.integers(1, 40))
    values = st.one_of(st.floats(-5, 5), st.integers(-3, 3).map(float))
    x = torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64)
    k = draw(st.floats(0.01, 0.99)) * n if draw(st.booleans()) else float(draw(st.integers(0, n)))
    alpha = 10.0 ** draw(st.floats(-4, 1))
    return x, k, alpha


@pytest.fixture(params=FAST)
def fast(request):
    import softtopk

    if softtopk.available_backends()[request.param] is not None:
        pytest.skip(f"{request.param} is not built")
    return request.param


@given(problem=problems())
@SETTINGS
def test_budget_bounds_order(fast, problem):
    x, k, alpha = problem
    p = soft_topk(x, k, alpha, backend=fast)
    assert p.sum().item() == pytest.approx(k, abs=1e-12 * max(1, k))
    assert (p >= 0).all() and (p <= 1).all()
    order = x.argsort()
    assert (p[order].diff() >= -1e-13).all()
    for value in x.unique():
        assert p[x == value].unique().numel() == 1


@given(problem=problems(), shift=st.integers(-8, 8), power=st.integers(-6, 6), seed=st.integers(0, 99))
@SETTINGS
def test_invariances(fast, problem, shift, power, seed):
    x, k, alpha = problem
    p = soft_topk(x, k, alpha, backend=fast)
    scaled = soft_topk(x * 2.0**power, k, alpha * 2.0**power, backend=fast)
    torch.testing.assert_close(scaled, p, atol=1e-14, rtol=0)
    shifted = soft_topk(x + shift, k, alpha, backend=fast)
    torch.testing.assert_close(shifted, p, atol=1e-12 + 1e-14 / alpha, rtol=0)
    permutation = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    permuted = soft_topk(x[permutation], k, alpha, backend=fast)
    torch.testing.assert_close(permuted, p[permutation], atol=1e-13, rtol=0)


@given(problem=problems(), fraction=st.floats(0, 1))
@SETTINGS
def test_monotone_in_k_and_dual(fast, problem, fraction):
    x, k, alpha = problem
    n = len(x)
    p = soft_topk(x, k, alpha, backend=fast)
    more = soft_topk(x, k + fraction * (n - k), alpha, backend=fast)
    assert (more - p >= -1e-13).all()
    dual = soft_topk(-x, n - k, alpha, backend=fast)
    torch.testing.assert_close(dual, 1 - p, atol=1e-12, rtol=0)


@given(problem=problems(), seed=st.integers(0, 99))
@SETTINGS
def test_gradients_are_consistent(fast, problem, seed):
    """grad_x sums to 0; p(c x, c alpha) does not depend on c: <grad_x, x> + alpha grad_alpha = 0."""
    x, k, alpha = problem
    x.requires_grad_()
    budget = torch.tensor(k, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    v = torch.randn(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p = soft_topk(x, budget, scale, backend=fast)
    grad_x, grad_k, grad_alpha = torch.autograd.grad(p, (x, budget, scale), v)
    size = grad_x.abs().sum() + 1e-300
    assert grad_x.sum().abs() <= 1e-12 * size
    assert v.min() - 1e-12 <= grad_k <= v.max() + 1e-12
    euler = (grad_x * x.detach()).sum() + alpha * grad_alpha
    assert euler.abs() <= 1e-11 * (size * (1 + x.detach().abs().max()) + (alpha * grad_alpha).abs())


@given(problem=problems())
@SETTINGS
def test_tends_to_the_hard_mask(fast, problem):
    x, k, _ = problem
    k = float(round(k))
    ranked = x.sort(descending=True).values
    n = len(x)
    gap = (ranked[int(k) - 1] - ranked[int(k)]).item() if 0 < k < n else 1.0
    if gap < 1e-3:
        return
    p = soft_topk(x, k, gap / 200, backend=fast)
    want = torch.zeros(n, dtype=torch.float64)
    want[x.argsort(descending=True)[: int(k)]] = 1
    torch.testing.assert_close(p, want, atol=1e-15, rtol=0)
