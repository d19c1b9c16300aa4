"""Every backend at the accuracy bars: outputs and gradients against the float64 oracle."""

from __future__ import annotations

import functools

import pytest
import torch

from softtopk import dispatch
from tests.accuracy import (
    LOG_FORMS,
    difference,
    log_weights,
    oracle,
    ratios,
    run,
    units_in_last_place,
)
from tests.cases import ADVERSARIAL_FAMILIES, ALPHAS, BAR_FAMILIES, LENGTHS, budgets, gapped, make
from tests.conftest import skip_if_slow


@functools.cache
def bar_case(family: str, n: int, alpha: float, form: str = "p"):
    """One row per budget, a random v, and the oracle's result; shared by all backends."""
    x, k, v = bar_inputs(family, n)
    return x, k, v, oracle(x, k, alpha, v, form=form)


def bar_inputs(family: str, n: int, dtype: torch.dtype = torch.float32):
    k = torch.tensor(budgets(n), dtype=torch.float64)
    x = make(family, len(k), n, seed=n)
    return x, k, torch.randn(x.shape, generator=torch.Generator().manual_seed(n + 1), dtype=dtype)


def assert_within_bars(got, want, k, alpha, v, form="p"):
    over = {name: r for name, r in ratios(got, want, k, alpha, v, form).items() if not r <= 1}
    assert not over, f"times the bar: {over}"


def log_case(backend, device, form, x, k, alpha, v):
    """What a backend and the oracle give in the log domain."""
    want = oracle(x, k, alpha, v, form=form)
    k = k.to(device) if isinstance(k, torch.Tensor) else k
    return run(dispatch.module(backend), x.to(device), k, alpha, v.to(device), form=form), want


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("family", BAR_FAMILIES)
def test_bars(backend, device, family, alpha, n):
    every_second = alpha in (1.0, 1e-2, 1e-4)
    large = alpha == 1e-2 and family in ("normal", "heavy_tailed")
    skip_if_slow(backend, device, (n <= 4096 and every_second) or large)
    x, k, v, want = bar_case(family, n, alpha)
    got = run(dispatch.module(backend), x.to(device), k.to(device), alpha, v.to(device))
    assert_within_bars(got, want, k, alpha, v)


@pytest.mark.parametrize("n", [31, 5000])
@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", ADVERSARIAL_FAMILIES)
def test_adversarial_rows(backend, device, family, alpha, n):
    skip_if_slow(backend, device, n == 31 or alpha == 1e-2)
    x, k, v, want = bar_case(family, n, alpha)
    got = run(dispatch.module(backend), x.to(device), k.to(device), alpha, v.to(device))
    assert_within_bars(got, want, k, alpha, v)


@pytest.mark.parametrize("n", [64, 5000])
@pytest.mark.parametrize("gap", [1e1, 1e2, 1e3, 1e4, 1e6])
def test_integer_k_in_a_gap(backend, device, gap, n):
    """p is exact with almost any threshold in the gap; grad_k is not."""
    alpha = 1e-4
    x = gapped(gap, alpha, 32, n)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    want = oracle(x, 32.0, alpha, v)
    got = run(dispatch.module(backend), x.to(device), 32.0, alpha, v.to(device))
    assert_within_bars(got, want, 32.0, alpha, v)


@pytest.mark.parametrize("alpha", [1e-45, 1e-40, 1e-38, 1e-20, 1e10, 1e30])
@pytest.mark.parametrize("family", ["normal", "tied", "huge_range", "denormal"])
def test_extreme_alpha(backend, device, family, alpha):
    """alpha as float32 (1e-45 and 1e-40 are denormal; 1 / alpha overflows below 4e-39)."""
    alpha = torch.full((3,), alpha, dtype=torch.float32)
    k = torch.tensor([1.0, 7.5, 40.0], dtype=torch.float64)
    x = make(family, 3, 100)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    want = oracle(x, k, alpha, v)
    got = run(dispatch.module(backend), x.to(device), k.to(device), alpha.to(device), v.to(device))
    over = {n: r for n, r in ratios(got, want, k, alpha, v).items() if not r <= 1}
    assert not over, f"times the bar: {over}"
    assert not got.grad_x.isnan().any() and not got.grad_alpha.isnan().any()


def test_alpha_over_six_decades_in_one_batch(backend, device):
    alpha = torch.logspace(-5, 1, 13)
    k = torch.linspace(0.5, 200.25, 13)
    x = make("normal", 13, 3000)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    want = oracle(x, k, alpha, v)
    got = run(dispatch.module(backend), x.to(device), k.to(device), alpha.to(device), v.to(device))
    assert_within_bars(got, want, k, alpha, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", BAR_FAMILIES)
@pytest.mark.parametrize("n", [31, 4096])
def test_half_precision_is_one_rounding(backend, device, family, alpha, n, dtype):
    skip_if_slow(backend, device, n == 31 or alpha == 1e-2)
    k = torch.tensor(budgets(n), dtype=torch.float64)
    x = make(family, len(k), n, seed=n).clamp(-6e4, 6e4).to(dtype)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    want = oracle(x, k, alpha, v)
    module = dispatch.module(backend)
    p, solution = module.soft_topk_forward(x.to(device), k.to(device), alpha, True)
    assert units_in_last_place(p.cpu(), want.p).max() <= 1
    grad_x, grad_k, grad_alpha = module.soft_topk_backward(x.to(device), solution, alpha, v.to(device), True)
    unit = torch.finfo(dtype).eps
    v_max = v.double().abs().amax(1, keepdim=True)
    scale = torch.maximum(want.grad_x.abs().amax(1, keepdim=True), 1e-30 * v_max / alpha)  # as the bars
    representable = scale <= torch.finfo(dtype).max
    error = (grad_x.double().cpu() - want.grad_x).abs() - unit * want.grad_x.abs()
    floor = torch.finfo(dtype).tiny
    assert torch.where(representable, error - 1e-5 * scale - floor, -1).max() <= 0
    assert ((grad_k.double().cpu() - want.grad_k).abs() <= 1e-5 * v.abs().amax(1)).all()


@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", BAR_FAMILIES)
def test_float64(backend, device, family, alpha):
    n = 4096
    k = torch.tensor(budgets(n), dtype=torch.float64)
    x = make(family, len(k), n).double() * (1 + 1e-9)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    want = oracle(x, k, alpha, v)
    got = run(dispatch.module(backend), x.to(device), k.to(device), alpha, v.to(device))
    ulp = torch.finfo(torch.float64).eps * x.abs().max().item()
    assert (got.p - want.p).abs().max() <= 1e-12 + 4 * ulp / alpha
    assert (got.grad_k - want.grad_k).abs().max() <= 1e-11 * v.abs().max() + 4 * ulp / alpha
    grad_x_bar = (1e-10 + 8 * ulp / alpha) * want.grad_x.abs().amax(1, keepdim=True)
    assert ((got.grad_x - want.grad_x).abs() <= grad_x_bar).all()


def test_k_number_keeps_double_precision(backend, device):
    """k = n - 1e-9 in float32 rows: D = |A| - k must not be rounded to float32 before the difference."""
    x = make("normal", 1, 4096)
    v = torch.ones_like(x)
    k = 4096 - 1e-9
    for value in (k, torch.tensor([k], dtype=torch.float64, device=device)):
        got = run(dispatch.module(backend), x.to(device), value, 0.01, v.to(device))
        assert got.solution[0, 4].item() == pytest.approx(1e-9, rel=1e-3)


# benchmarks/accuracy.py has all alphas at all lengths; here the longest take one.
LOG_CELLS = [(n, alpha) for n in LENGTHS for alpha in ALPHAS if n <= 4096 or alpha == 1e-2]


@pytest.mark.parametrize("n,alpha", LOG_CELLS)
@pytest.mark.parametrize("family", BAR_FAMILIES)
@pytest.mark.parametrize("form", LOG_FORMS)
def test_log_bars(backend, device, form, family, n, alpha):
    few = alpha == 1e-2 and (n <= 31 or (n, family) == (4096, "normal"))
    skip_if_slow(backend, device, few)
    x, k, v, want = bar_case(family, n, alpha, form)
    got = run(dispatch.module(backend), x.to(device), k.to(device), alpha, v.to(device), form=form)
    assert_within_bars(got, want, k, alpha, v, form)


@pytest.mark.parametrize("n", [31, 5000])
@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", ADVERSARIAL_FAMILIES)
@pytest.mark.parametrize("form", LOG_FORMS)
def test_log_of_adversarial_rows(backend, device, form, family, alpha, n):
    skip_if_slow(backend, device, n == 31 and alpha == 1e-2)
    x, k, v, want = bar_case(family, n, alpha, form)
    got = run(dispatch.module(backend), x.to(device), k.to(device), alpha, v.to(device), form=form)
    assert_within_bars(got, want, k, alpha, v, form)


@pytest.mark.parametrize("n", [64, 5000])
@pytest.mark.parametrize("gap", [1e1, 1e2, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_log_at_integer_k_in_a_gap(backend, device, form, gap, n):
    """h underflows, its logarithm does not; and without the minor side grad_k is finite and small."""
    alpha = 1e-4
    x = gapped(gap, alpha, 32, n)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    major = torch.arange(n) < 32 if form == "log" else torch.arange(n) >= 32
    for incoming in (v, torch.where(major, v, 0)):
        got, want = log_case(backend, device, form, x, 32.0, alpha, incoming)
        assert_within_bars(got, want, 32.0, alpha, incoming, form)
    assert got.grad_k.abs().item() <= v.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", BAR_FAMILIES)
@pytest.mark.parametrize("n", [31, 4096])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_log_in_half_precision_is_one_rounding(backend, device, form, family, alpha, n, dtype):
    skip_if_slow(backend, device, n == 31 and family in ("normal", "tied"))
    x, k, v = bar_inputs(family, n)
    x, v = x.clamp(-6e4, 6e4).to(dtype), v.to(dtype)
    got, want = log_case(backend, device, form, x, k, alpha, v)
    y, _ = dispatch.module(backend).soft_topk_forward(x.to(device), k.to(device), alpha, form=form)
    assert units_in_last_place(y.cpu(), want.p).max() <= 1
    unit, floor = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    v_max = v.double().abs().amax(1, keepdim=True)
    scale = torch.maximum(want.grad_x.abs().amax(1, keepdim=True), 1e-30 * v_max / alpha)  # as the bars
    representable = scale <= torch.finfo(dtype).max
    error = (got.grad_x - want.grad_x).abs() - unit * want.grad_x.abs()
    assert torch.where(representable, error - 1e-5 * scale - floor, -1).max() <= 0
    worst = ratios(got, want, k, alpha, v, form)
    assert worst["grad_k"] <= 1 and worst["grad_alpha"] <= 1


@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", BAR_FAMILIES)
@pytest.mark.parametrize("n", [31, 4096])
@pytest.mark.parametrize("form", LOG_FORMS)
def test_log_in_float64(backend, device, form, n, family, alpha):
    skip_if_slow(backend, device, n == 31 and family in ("normal", "tied"))
    x, k, v = bar_inputs(family, n, torch.float64)
    x = x.double() * (1 + 1e-9)
    got, want = log_case(backend, device, form, x, k, alpha, v)
    ulp = torch.finfo(torch.float64).eps * x.abs().amax(1) / alpha  # of t, the same in log h
    size = want.p.abs()
    bar = 1e-12 * size + 4 * ulp.unsqueeze(1) * (2 * size).clamp(max=1) + 1e-300
    assert (difference(got.p, want.p) <= bar).all()
    _, scale_k = log_weights(want, torch.tensor(alpha), v)
    scale_k = torch.maximum(scale_k, v.abs().amax(1))
    assert (difference(got.grad_k, want.grad_k) <= (1e-11 + 4 * ulp) * scale_k).all()
    grad_x_bar = (1e-10 + 8 * ulp) * torch.maximum(want.grad_x.abs().amax(1), 1e-30 * v.abs().amax(1) / alpha)
    assert ((got.grad_x - want.grad_x).abs().amax(1) <= grad_x_bar).all()
