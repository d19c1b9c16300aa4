"""The log domain and the solve without output, on every backend: what no float of p could tell."""

from __future__ import annotations

import math

import pytest
import torch
from torch import inf, nan

from softtopk import dispatch
from tests.accuracy import LOG_FORMS, oracle, ratios, relative_error, run
from tests.cases import make


@pytest.fixture
def kernels(backend):
    return dispatch.module(backend)


@pytest.fixture
def log(kernels, device):
    """log(x, k, alpha, v, form, largest): y and the gradients of <y, v>, on the CPU as they come."""

    def function(x, k, alpha, v, form="log", largest=True):
        x, k, v = (torch.as_tensor(t, dtype=torch.float32, device=device) for t in (x, k, v))
        y, solution = kernels.soft_topk_forward(x, k, alpha, largest, form)
        return y.cpu(), *(g.cpu() for g in kernels.soft_topk_backward(x, solution, alpha, v, largest, form))

    return function


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 40, 3000])
def test_none_is_the_solution_alone(kernels, device, n):
    x, k = random(4, n).to(device), torch.tensor([0.5, 0.0, n - 0.25, nan], device=device)
    x[0, n - 1] = -inf
    before = x.clone()
    for largest in (True, False):
        nothing, solution = kernels.soft_topk_forward(x, k, 0.1, largest, "none")
        assert nothing is None
        for form in ("p", *LOG_FORMS):
            y, want = kernels.soft_topk_forward(x, k, 0.1, largest, form)
            torch.testing.assert_close(solution, want, rtol=0, atol=0, equal_nan=True)
            assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(x, before)


@pytest.mark.parametrize("gap", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_log_h_is_exact_where_h_underflows(log, form, gap):
    """k = 1 of two elements a gap apart: log p of the lower one is -gap / 2 - ln 2."""
    y, grad_x, grad_k, _ = log([[gap, 0.0]], [1.0], 1.0, [[2.0, 3.0]], form)
    minor = 1 if form == "log" else 0
    assert y[0, minor].item() == pytest.approx(-gap / 2 - math.log(2), rel=1e-6)
    assert y[0, 1 - minor] == 0
    # Half of a step of either element moves b.
    v = [2.0, 3.0][minor]
    assert grad_x[0].tolist() == [-v / 2, v / 2]
    assert grad_k.item() == (inf if form == "log" else -inf)


@pytest.mark.parametrize("form", LOG_FORMS)
def test_masked_elements_do_not_count(log, form):
    x, v = random(3, 40), random(3, 49, seed=1)
    masked = torch.cat([x, torch.full((3, 9), -inf)], 1)[:, torch.randperm(49)]
    kept = masked.isfinite()
    k, alpha = [1, 5.5, 38], 0.05
    y, *gradients = log(masked, k, alpha, v, form)
    assert (y[~kept] == (-inf if form == "log" else 0)).all() and (gradients[0][~kept] == 0).all()
    want_y, *want = log(masked[kept].reshape(3, 40), k, alpha, v[kept].reshape(3, 40), form)
    torch.testing.assert_close(y[kept].reshape(3, 40), want_y)
    torch.testing.assert_close(gradients[0][kept].reshape(3, 40), want[0], rtol=1e-5, atol=1e-5 / alpha)
    torch.testing.assert_close(gradients[1:], want[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", LOG_FORMS)
def test_plus_infinity_takes_one_unit(log, form):
    x, v = [[1.0, inf, 2.0, 0.5, inf]], [[1.0, nan, 2.0, 3.0, inf]]
    y, grad_x, grad_k, grad_alpha = log(x, [3], 0.1, v, form)
    want_y, want_x, want_k, want_alpha = log([[1.0, 2.0, 0.5]], [1], 0.1, [[1.0, 2.0, 3.0]], form)
    assert y[0, [1, 4]].tolist() == ([0, 0] if form == "log" else [-inf, -inf])
    assert grad_x[0, [1, 4]].tolist() == [0, 0]
    torch.testing.assert_close(y[:, [0, 2, 3]], want_y)
    torch.testing.assert_close(grad_x[:, [0, 2, 3]], want_x)
    torch.testing.assert_close((grad_k, grad_alpha), (want_k, want_alpha))


@pytest.mark.parametrize("k", [-3, 0.5, 3.5, 9])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_no_gradient_where_k_was_clamped(log, form, k):
    y, *gradients = log([[inf, 2.0, 2.0, -inf]], [k], 0.1, [[7.0, 2.0, nan, 9.0]], form)
    chosen = 1 if k < 1 else 3
    p = torch.tensor([[1.0] * chosen + [0.0] * (4 - chosen)])
    assert torch.equal(y, p.log() if form == "log" else (1 - p).log())
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("form", LOG_FORMS)
def test_no_finite_element(log, form):
    x = [[inf, -inf, inf], [-inf, -inf, -inf], [inf, inf, inf]]
    y, *gradients = log(x, [2, 0, 3], 1.0, [[1.0] * 3] * 3, form)
    p = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])
    assert torch.equal(y, p.log() if form == "log" else (1 - p).log())
    assert not any(g.any() for g in gradients)


def at_the_ends(form: str) -> tuple[float, float]:
    """The k of four elements at which w (p, or 1 - p) is 1, and that at which it is 0."""
    return (4.0, 0.0) if form == "log" else (0.0, 4.0)


@pytest.mark.parametrize("form", LOG_FORMS)
def test_where_w_is_one(log, form):
    """log w = 0 and only k could move it: by a softmax, as p itself."""
    x, v = torch.tensor([[0.3, -0.2, 0.1, 0.25]]), torch.tensor([[1.0, 2.0, -3.0, 0.5]])
    y, grad_x, grad_k, grad_alpha = log(x, [at_the_ends(form)[0]], 0.2, v, form)
    assert not y.any() and not grad_x.any() and not grad_alpha.any()
    sign = 1 if form == "log" else -1
    want = sign * (torch.softmax(-sign * x.double() / 0.2, 1) * v).sum()
    assert grad_k.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("form", LOG_FORMS)
def test_where_w_is_zero(log, form):
    """log w = -inf = log k + log softmax(x / alpha), whose gradient to x and alpha stays finite."""
    x, sign = torch.tensor([[0.3, -0.2, 0.1, 0.25]]), 1 if form == "log" else -1
    q = torch.softmax(sign * x.double() / 0.2, 1)
    for v in (torch.tensor([[1.0, 2.0, -3.5, 0.25]]), torch.tensor([[1.0, 2.0, -3.5, 0.5]])):
        y, grad_x, grad_k, grad_alpha = log(x, [at_the_ends(form)[1]], 0.2, v, form)
        assert (y == -inf).all()
        total = v.sum()
        torch.testing.assert_close(grad_x, (sign * (v - q * total) / 0.2).float())
        want = -sign * (v * (x - (q * x).sum()) / 0.2).sum() / 0.2
        assert grad_alpha.item() == pytest.approx(want.item(), rel=1e-4)
        assert grad_k.item() == (0 if total == 0 else sign * math.copysign(inf, total))


@pytest.mark.parametrize("n", [7, 3000])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_nan_in_v_does_not_spread_from_where_nothing_depends_on_it(log, form, n):
    """Infinite elements, and those of the major side that are far from the threshold."""
    sign = 1 if form == "log" else -1
    x = sign * torch.cat([torch.tensor([[3.0, 2.9, 2.95]]), torch.full((1, n - 3), 1e3)], 1)
    v = torch.cat([torch.tensor([[1.0, 2.0, 3.0]]), torch.full((1, n - 3), nan)], 1)
    x[0, -1], x[0, -2] = -inf, inf
    k = n - 3.5 if form == "log" else 2.5  # in the middle of the three
    y, grad_x, grad_k, grad_alpha = log(x, [k], 0.1, v, form)
    assert grad_x.isfinite().all() and grad_k.isfinite().all() and grad_alpha.isfinite().all()
    assert (grad_x[0, 3:] == 0).all() and (grad_x[0, :3] != 0).all() and grad_k.item() != 0


@pytest.mark.parametrize("n", [5, 2100])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_a_bad_row_is_nan_and_the_others_are_untouched(log, form, n):
    x, v, k = random(6, n), random(6, n, seed=1), torch.full((6,), 2.0)
    want = log(x, k, 0.1, v, form)
    x[1, n - 2], k[3] = nan, nan
    got = log(x, k, 0.1, v, form)
    for g, w in zip(got, want, strict=True):
        assert g[[1, 3]].isnan().all()
        assert torch.equal(g[[0, 2, 4, 5]], w[[0, 2, 4, 5]])
    for alpha in (nan, 0.0, -1.0, inf):
        assert all(t.isnan().all() for t in log(x[:1], k[:1], alpha, v[:1], form))


@pytest.mark.parametrize("form", LOG_FORMS)
def test_smallest_is_the_operator_on_minus_x(log, form):
    x, v = random(4, 333), random(4, 333, seed=1)
    got = log(x, [1, 7.5, 100, 332], 0.01, v, form, largest=False)
    want = log(-x, [1, 7.5, 100, 332], 0.01, v, form)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], -want[1])
    assert torch.equal(got[2], want[2]) and torch.equal(got[3], want[3])


@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
def test_duality(log, alpha):
    """log(1 - p)(x, k) = log p(-x, n - k): gradients to x and k change sign, those to alpha do not."""
    n = 500
    x, v, k = random(4, n), random(4, n, seed=1), torch.tensor([0.5, 20, 250.25, 499])
    y, grad_x, grad_k, grad_alpha = log(x, k, alpha, v, "log_complement")
    dual_y, dual_x, dual_k, dual_alpha = log(-x, n - k, alpha, v, "log")
    assert (relative_error(y.double(), dual_y.double()) <= 1e-5).all()
    torch.testing.assert_close(grad_x, -dual_x, rtol=1e-5, atol=1e-5 * dual_x.abs().max().item())
    torch.testing.assert_close(grad_k, -dual_k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_alpha, dual_alpha, rtol=1e-3, atol=1e-4 * v.abs().sum().item() / alpha)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_equal_elements_share_k(log, form, n):
    """w = k / n or 1 - k / n whatever alpha: no gradient to x or alpha, but for v that differ."""
    for k in (0.25 * n, 0.5 * n, 0.75 * n):
        y, grad_x, grad_k, grad_alpha = log([[0.7] * n], [k], 1e-3, [[2.0] * n], form)
        w = k / n if form == "log" else 1 - k / n
        assert y[0].tolist() == pytest.approx([math.log(w)] * n, rel=1e-6)
        assert (grad_x.abs() <= 1e-6 / 1e-3).all() and not grad_alpha.any()
        assert n == 2 or grad_x.item() == 0
        assert grad_k.item() == pytest.approx((2 if form == "log" else -2) / w, rel=1e-6)


@pytest.mark.parametrize("alpha", [1e-45, 1e-40, 1e-38, 1e-20, 1e10, 1e30])
@pytest.mark.parametrize("family", ["normal", "tied", "huge_range", "denormal"])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_extreme_alpha(kernels, device, form, family, alpha):
    """1 / alpha, t and the gradients may overflow in float32: to the infinity that float64 rounds to."""
    alpha = torch.full((3,), alpha, dtype=torch.float32)
    k = torch.tensor([1.0, 7.5, 40.0], dtype=torch.float64)
    x = make(family, 3, 100)
    v = random(3, 100, seed=5)
    want = oracle(x, k, alpha, v, form=form)
    got = run(kernels, x.to(device), k.to(device), alpha.to(device), v.to(device), form=form)
    worst = ratios(got, want, k, alpha, v, form)
    if family == "huge_range" and alpha[0] < 1e-30:  # t, up to 1e75, is more than native sums can hold
        del worst["grad_alpha"]
    assert all(r <= 1 for r in worst.values()), f"times the bar: {worst}"


def test_differences_beyond_the_largest_number(log):
    """x - r overflows, (x - r) / alpha does not: log p is -7e8 or so, t and the gradients are finite."""
    x, alpha = torch.tensor([[3e38, 2.9e38, -3e38, -3.4e38]]), 1e30
    for form in LOG_FORMS:
        y, *gradients = log(x, [1.5], alpha, [[1.0, -2.0, 3.0, 0.5]], form)
        want = oracle(x, 1.5, alpha, torch.tensor([[1.0, -2.0, 3.0, 0.5]]), form=form)
        assert (relative_error(y.double(), want.p) <= 1e-5).all()
        for g, w in zip(gradients, (want.grad_x, want.grad_k, want.grad_alpha), strict=True):
            torch.testing.assert_close(g, w.float(), rtol=1e-4, atol=1e-35)


@pytest.mark.parametrize("form", ["p", *LOG_FORMS])
@pytest.mark.parametrize(
    "alpha, nearest", [(1e-50, 2.0**-149), (1e-300, 2.0**-149), (1e60, (2 - 2.0**-23) * 2.0**127)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_beyond_float32(kernels, device, dtype, alpha, nearest, form):
    """A number or a float64 tensor that float32 would round to 0 or to infinity is the nearest scale."""
    x, v = random(3, 50).to(dtype).to(device), random(3, 50, seed=1).to(dtype).to(device)
    k = torch.tensor([1.0, 7.5, 49.5], device=device)

    def everything(scale):
        y, solution = kernels.soft_topk_forward(x, k, scale, True, form)
        return y, solution, *kernels.soft_topk_backward(x, solution, scale, v, True, form)

    want = everything(torch.full((3,), nearest, device=device))
    assert not want[0].isnan().any() and not want[1].isnan().any()
    for scale in (alpha, torch.full((3,), alpha, dtype=torch.float64, device=device)):
        for got, expected in zip(everything(scale), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    for bad in (0.0, -1.0, inf, nan):
        assert all(t.isnan().all() for t in everything(torch.full((3,), bad, device=device)))


def test_float16_overflows_to_minus_infinity(kernels, device):
    x = torch.tensor([[20.0, 0.0, 13.0]], dtype=torch.float16, device=device)
    y, _ = kernels.soft_topk_forward(x, 1.0, 1e-4, form="log")
    assert y[0, 0] == 0 and y[0, 1] == -inf and y[0, 2].item() == pytest.approx(-35000.7, abs=32)
