"""Gradients of the selection: of pre-activations, biases, budgets and scales."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nan
from torch.autograd import gradcheck

from softtopk import hard_topk_code, soft_topk_code, soft_topk_decode
from tests.accuracy import alpha_weight, difference, oracle
from tests.cases import BAR_FAMILIES, gapped, make
from tests.conftest import skip_if_slow
from tests.sparse_oracle import dense, dense_hard, leaves, places


def dense_gradients(pre, k, alpha, g, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Those of <f, g> to pre, k and alpha by autograd of the composite, in float64 on the CPU."""
    at = leaves(*(t.double().cpu() for t in (pre, k, alpha)))
    return torch.autograd.grad(dense(*at, **options), at, g.double().cpu())


def problem(rows: int, n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """float64 pre, k, alpha and g (rows, n), with more and less than k positive elements."""
    draw = torch.Generator().manual_seed(seed)
    pre = torch.randn(rows, n, generator=draw, dtype=torch.float64)
    k = 0.5 + 0.7 * n * torch.rand(rows, generator=draw, dtype=torch.float64)
    alpha = 10 ** (-1.5 * torch.rand(rows, generator=draw, dtype=torch.float64))
    return pre, k, alpha, torch.randn(rows, n, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.0, 0.3, -2.0])
def test_equal_to_the_dense_composite(backend, device, hard, scale):
    """In float64, with the gradient that comes through the selection scaled."""
    pre, k, alpha, g = problem(12, 40)
    options = {"hard": hard, "selection_gradient": scale}
    want = dense_gradients(pre, k, alpha, g, **options)
    at = leaves(*(t.to(device) for t in (pre, k, alpha)))
    code = soft_topk_code(*at, backend=backend, **options)
    got = torch.autograd.grad(code.to_dense(), at, g.to(device))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-11, rtol=1e-10)


@functools.cache
def bar_case(family: str, alpha: float, hard: bool, n: int = 700):
    k = torch.tensor([0.5, 1, 8, 8.5, n / 3, 0.75 * n, n - 0.5])
    pre = make(family, len(k), n, seed=n)
    g = torch.randn(pre.shape, generator=torch.Generator().manual_seed(7))
    scale = torch.full((len(k),), alpha, dtype=torch.float64)
    with_selection = dense_gradients(pre, k, scale, g, hard=hard)
    without = dense_gradients(pre, k, scale, g, hard=hard, selection_gradient=0.0)
    return pre, k, g, with_selection, without[0]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", BAR_FAMILIES)
def test_float32_at_the_bars(backend, device, family, alpha, hard):
    """The bars of the dense operator: 1e-6 in p, 1e-5 of the largest gradient, 1e-4 of grad_alpha's scale."""
    skip_if_slow(backend, device, alpha == 1e-2 and not hard)
    pre, k, g, want, direct = bar_case(family, alpha, hard)
    scale = torch.full((len(k),), alpha, device=device)
    at = leaves(pre.to(device), k.to(device), scale)
    code = soft_topk_code(*at, hard=hard, backend=backend)
    got = [t.double().cpu() for t in torch.autograd.grad(code.to_dense(), at, g.to(device))]
    a, g = pre.double().relu(), g.double()
    v = a * g
    v_max = v.abs().amax(1)
    through = (want[0] - direct).abs().amax(1, keepdim=True)
    bar = 1e-5 * through + 1e-6 * g.abs() + 2.0**-23 * g.abs()
    assert (difference(got[0], want[0]) <= bar).all()
    assert (difference(got[1], want[1]) <= 1e-5 * v_max).all()
    exact = oracle(a, k, scale, v)
    weight = alpha_weight(exact, scale.double().cpu(), v)
    floor = 1e-30 * v_max / alpha
    assert (difference(got[2], want[2]) <= torch.where(weight > floor, 1e-4 * weight, torch.inf)).all()


@pytest.mark.parametrize("gap", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_k_in_a_gap(backend, device, dtype, gap, hard):
    """Half of q lies below the gap, where p is 0: dropped by p alone, grad_k would be off by that half."""
    alpha = 1e-6
    x = (gapped(gap, alpha, above=5, n=30, seed=2) + 2 + gap * alpha).to(dtype)
    k = torch.tensor([5.0], dtype=torch.float64)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, want, _ = dense_gradients(x, k, torch.tensor([alpha], dtype=torch.float64), g, hard=hard)
    at = leaves(x.to(device), k.to(device))
    code = soft_topk_code(*at, alpha, hard=hard, backend=backend)
    got = torch.autograd.grad(code.to_dense(), at[1], g.to(device, dtype), retain_graph=True)[0]
    v_max = (x.double() * g).abs().max()
    bar = 1e-5 if dtype == torch.float32 else 1e-9
    assert (got.cpu() - want).abs() <= bar * v_max
    if gap >= 1e3:  # what a rule by p would have left of q
        active = places(code, x.to(device))
        above = torch.where(active > 2 + gap * alpha, 1 / active, 0)
        (share,) = torch.autograd.grad(code.values, at[1], above)
        assert 0.49 < share < 0.51


def test_where_the_zeros_have_nearly_all_of_q():
    """grad_k is then a millionth of v; relative to the code's own entries it would be lost to rounding."""
    pre = torch.full((1, 50), -1.0)
    pre[0, [4, 9]] = torch.tensor([1.0, 1.1])
    g = torch.ones(1, 50)
    _, want, _ = dense_gradients(pre, torch.tensor([25.0]), torch.tensor([0.1]), g)
    at = leaves(pre, torch.tensor([25.0]))
    code = soft_topk_code(*at, 0.1, backend="reference")
    (got,) = torch.autograd.grad(code.to_dense(), at[1], g)
    assert want < 1e-5 and abs(got - want) <= 1e-5 * want


def test_checked_by_differences(backend, device):
    pre = torch.tensor([[0.9, -0.4, 1.3, 0.35, 0.6, -1.0], [0.2, 0.5, 1.1, -0.1, 0.75, 1.6]])
    k, alpha = torch.tensor([2.3, 3.6]), torch.tensor([0.3, 0.4])
    bias = torch.tensor([0.02, 0.01, -0.03, 0.05, 0.04, -0.01])
    weight, out = torch.randn(6, 3), torch.randn(3)
    at = leaves(*(t.to(device, torch.float64) for t in (pre, k, alpha, bias, weight, out)))

    def composite(pre, k, alpha, bias, weight, out):
        x_hat, code = soft_topk_decode(pre, k, alpha, weight, out, bias=bias, threshold=0.05, backend=backend)
        return x_hat, code.values

    quick = backend == "triton"
    assert gradcheck(composite, at, eps=1e-6, atol=1e-5, fast_mode=quick, nondet_tol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bias_and_dtypes(backend, device, dtype):
    draw = torch.Generator().manual_seed(4)
    pre = torch.randn(5, 60, generator=draw).to(dtype)
    bias = torch.randn(60, generator=draw)
    g = torch.randn(5, 60, generator=draw)
    k = torch.tensor([4.0, 5.5, 9, 12, 30], dtype=torch.bfloat16)
    at = leaves(*(t.to(device) for t in (pre, bias, k, torch.tensor(0.05))))
    code = soft_topk_code(at[0], at[2], at[3], bias=at[1], backend=backend)
    got = torch.autograd.grad(code.to_dense(), at, g.to(device))
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.bfloat16, torch.float32]
    z = (pre + bias.to(dtype)).double()
    want = dense_gradients(z, k, torch.full((5,), 0.05, dtype=torch.float64), g)
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    size = want[0].abs().max()
    assert (got[0].double().cpu() - want[0]).abs().max() <= ulp * size
    assert (got[1].double().cpu() - want[0].sum(0)).abs().max() <= 5 * ulp * size
    assert (got[2].double().cpu() - want[1]).abs().max() <= 2.0**-8 * want[1].abs().max()
    assert (got[3].double().cpu() - want[2].sum()).abs() <= 1e-4 * want[2].abs().sum()
    # Only the bias
    only = soft_topk_code(pre.to(device), k.to(device), 0.05, bias=at[1], backend=backend)
    torch.testing.assert_close(torch.autograd.grad(only.to_dense(), at[1], g.to(device))[0], got[1])


def test_hard_codes(backend, device):
    pre, k, _, g = problem(6, 40, seed=3)
    x = pre.clone().requires_grad_()
    bias = torch.randn(
        40, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    want = torch.autograd.grad(dense_hard(x, k, bias, 0.1), [x, bias], g)
    at = leaves(pre.to(device), bias.to(device))
    code = hard_topk_code(at[0], k.to(device), bias=at[1], threshold=0.1, backend=backend)
    got = torch.autograd.grad(code.to_dense(), at, g.to(device))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-14, rtol=0)


def test_bad_rows_and_clamped_budgets(backend, device):
    pre = torch.rand(5, 30, generator=torch.Generator().manual_seed(0)) + 0.01
    pre[1, 8] = nan
    pre[2, 3] = torch.inf
    k = torch.tensor([4.0, 4.0, 4.0, 50.0, -1.0])
    at = leaves(pre.to(device), k.to(device), torch.full((5,), 0.05, device=device))
    code = soft_topk_code(*at, backend=backend)
    g = torch.ones(5, 30, device=device)
    to_pre, to_k, to_alpha = torch.autograd.grad(code.to_dense(), at, g)
    assert to_pre[1].isnan().any() and to_k[1].isnan() and to_alpha[1].isnan()
    good = torch.tensor([0, 3, 4])
    want = dense_gradients(pre[good], k[good], torch.full((3,), 0.05), torch.ones(3, 30))
    rest = good.to(device)
    assert (to_pre[rest].double().cpu() - want[0]).abs().max() <= 1e-5 * want[0].abs().max()
    torch.testing.assert_close(to_k[rest].double().cpu(), want[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(to_alpha[rest].double().cpu(), want[2], atol=1e-3, rtol=1e-4)
    assert to_k[3] == to_k[4] == 0 and to_pre[2].isfinite().all() and to_k[2].isfinite()


def test_values_of_unused_places_have_no_gradient(backend, device):
    pre = torch.rand(3, 20, device=device)
    for function in (soft_topk_code, hard_topk_code):
        x = pre.clone().requires_grad_()
        code = function(x, 3, backend=backend)
        code.values.backward(torch.where(code.indices < 20, 1.0, nan))
        assert x.grad.isfinite().all() and (x.grad != 0).any()
