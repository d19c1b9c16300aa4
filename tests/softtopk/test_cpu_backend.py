"""What is particular to the C++ backend: instruction sets, threads, positions, strides, rounding."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import inf, nan

import softtopk
from softtopk import dispatch
from tests.accuracy import LOG_FORMS
from tests.cases import FAMILIES, make

if (reason := softtopk.available_backends()["cpu"]) is not None:
    pytest.skip(f"cpu: {reason}", allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
cpu, reference = dispatch.module("cpu"), dispatch.module("reference")


def everything(x, k, alpha, v, largest=True) -> list[torch.Tensor]:
    """All that the backend computes for these rows."""
    p, solution = cpu.soft_topk_forward(x, k, alpha, largest)
    gradients = cpu.soft_topk_backward(x, solution, alpha, v, largest)
    mask = cpu.hard_topk_mask(x, k, largest)
    logs = []
    for form in LOG_FORMS:
        logs.append(cpu.soft_topk_forward(x, k, alpha, largest, form)[0])
        logs.extend(cpu.soft_topk_backward(x, solution, alpha, v, largest, form))
    return [p, solution, *gradients, mask, *cpu.hard_topk_indices(x, k, 40, largest), *logs]


def batch(dtype, rows: int, n: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(rows, n, generator=g).to(dtype)
    v = torch.randn(rows, n, generator=g).to(dtype)
    k = torch.rand(rows, generator=g, dtype=torch.float64) * n
    alpha = 10 ** -(4 * torch.rand(rows, generator=g))
    return x, k, alpha, v


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor]):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype, threads):
    arguments = batch(dtype, 37, 3000)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(everything(*arguments))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_shared_among_threads(dtype, rows, threads):
    """Fewer rows than threads: one row's sweeps go to several threads, in pieces."""
    n = 200_003
    x, k, alpha, v = batch(dtype, rows, n)
    x[-1, -5:], x[-1, n // 2] = inf, -inf
    tied = (x * 8).round() / 8  # the last of the selected ones lie in any piece
    for values in (x, tied, x.relu()):
        results = []
        for count in (1, 2, 3, 8):
            threads(count)
            results.append(everything(values, k, alpha, v))
        for got in results[1:]:
            assert_same_bits(got, results[0])
    alone = everything(x[-1:], k[-1:], alpha[-1:], v[-1:])
    assert_same_bits([t[-1:] for t in everything(x, k, alpha, v)], alone)


@pytest.mark.parametrize("family", ["normal", "relu", "tied", "constant", "two_values"])
def test_hard_topk_of_a_long_row(family, threads):
    """Ties are taken from the first pieces on, and indices ascend over all of them."""
    x = make(family, 1, 100_001)
    threads(4)
    for k in (1.0, 64.0, 20_000.0, 60_000.0, 100_000.0):
        assert torch.equal(cpu.hard_topk_mask(x, k), reference.hard_topk_mask(x, k))
        for got, want in zip(
            cpu.hard_topk_indices(x, k, 70_000), reference.hard_topk_indices(x, k, 70_000), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("n", [1, 63, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_position_and_alignment_change_no_bit(dtype, n):
    x, k, alpha, v = batch(dtype, 1, n)
    want = everything(x, k, alpha, v)
    for shift in (1, 3):
        wide_x, wide_v = torch.randn(5, n + 7).to(dtype), torch.randn(5, n + 9).to(dtype)
        wide_x[3, shift : shift + n], wide_v[3, shift : shift + n] = x, v
        got = everything(
            wide_x[:, shift : shift + n], k.expand(5), alpha.expand(5), wide_v[:, shift : shift + n]
        )
        assert_same_bits([t[3:4] for t in got], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Columns, every second element, one row expanded, v expanded along rows and from a single number."""
    x, k, alpha, v = batch(dtype, 6, 300)
    pairs = [
        (x.t().contiguous().t(), v.t().contiguous().t()),
        (torch.stack([x, x], 2)[:, :, 0], torch.stack([v, v], 2)[:, :, 1]),
        (x[2].expand(6, 300), v[1].expand(6, 300)),
        (x, torch.tensor(0.75, dtype=dtype).expand(6, 300)),
    ]
    for strided_x, strided_v in pairs:
        got = everything(strided_x, k, alpha, strided_v)
        assert_same_bits(got, everything(strided_x.contiguous(), k, alpha, strided_v.contiguous()))
    every_second = torch.stack([k, k + 1], 1)[:, 0], torch.stack([alpha, alpha], 1)[:, 1]
    assert_same_bits(everything(x, *every_second, v), everything(x, k, alpha, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_conversions(dtype):
    """Every finite value is read exactly, and float results round to nearest even as torch does."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].unsqueeze(1)  # (values, 1): the only element is r_A or r_B
    _, solution = cpu.soft_topk_forward(every, 0.25, 1.0)
    assert torch.equal(solution[:, 1], every[:, 0].float())
    # n = 1: p = k, from the least float16 (and below) to 1.
    k = torch.cat([torch.rand(20000), 10 ** (-9 * torch.rand(20000)), torch.tensor([0.0, 1.0])])
    p, _ = cpu.soft_topk_forward(torch.zeros(len(k), 1, dtype=dtype), k, 1.0)
    assert torch.equal(p[:, 0], k.to(dtype))


def test_flushing_of_denormals_changes_nothing():
    """With it the smallest number above 0 compares equal to 0."""
    x = torch.cat([make("relu", 3, 3000), make("denormal", 3, 3000)])
    x[2] = x[2].gt(1).float()
    arguments = x, torch.full((6,), 1700.5), torch.tensor([1.0, 1e-2, 1e-4, 1e-40, 1e-43, 1e-45]), x + 1
    want = everything(*arguments)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        got = everything(*arguments)
        assert torch.tensor(1e-40).mul(0.5).item() == 0  # and the caller's mode is as it was
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, want)


def test_zero_rows_and_max_k_zero():
    x = torch.empty(0, 5)
    p, solution = cpu.soft_topk_forward(x, 2.0, 0.1)
    assert p.shape == (0, 5) and solution.shape == (0, 5)
    grad_x, grad_k, grad_alpha = cpu.soft_topk_backward(x, solution, 0.1, x)
    assert grad_x.shape == (0, 5) and grad_k.shape == grad_alpha.shape == (0,)
    indices, counts = cpu.hard_topk_indices(torch.randn(3, 5), 2.0, 0)
    assert indices.shape == (3, 0) and counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("n", [4, 3000, 100_001])
def test_a_bad_row_stays_alone(n):
    x = make("normal", 7, n)
    x[1, 2], x[2] = nan, inf
    x[3, 1:] = -inf
    k = torch.tensor([2.0, 2, 2, 1, nan, 2, 2])
    alpha = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, -1, inf])
    p, solution, grad_x, grad_k, grad_alpha, mask, indices, counts, *logs = everything(
        x, k, alpha, torch.ones_like(x)
    )
    for row in (1, 4, 5, 6):
        for t in (p, solution, grad_x, grad_k, grad_alpha, *logs):
            assert t[row].isnan().all()
    for row in (1, 4):
        assert mask[row].isnan().all() and counts[row] == 0 and (indices[row] == -1).all()
    assert p[2].eq(1).all() and p[3].tolist() == [1] + [0] * (n - 1)
    for t in (p, solution, grad_x, grad_k, grad_alpha, mask, *logs):
        assert not t[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("alpha", [1e-45, 1e-40, 1e-38, 1e-20, 1e-8, 1e8, 1e30])
@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_scales(family, alpha):
    """1/alpha overflows below 4e-39; x/alpha overflows long before."""
    alpha = torch.tensor([alpha] * 4)
    k = torch.tensor([0.5, 7, 1000, 2999.5], dtype=torch.float64)
    x = make(family, 4, 3000)
    p, _ = cpu.soft_topk_forward(x, k, alpha)
    want, _ = reference.soft_topk_forward(x.double(), k, alpha)
    assert (p - want).abs().max() <= 1e-6


@pytest.mark.parametrize("k", [1, 32, 2000])
def test_long_rows_with_outliers(k):
    """Far from the rest an element bounds the search from above, and trial after trial leaves it there."""
    x = make("outlier", 3, 65536, seed=65536)
    x[2, :20] = 10.0 ** torch.arange(10, 30)
    for alpha in (1.0, 1e-2, 1e-4):
        p, _ = cpu.soft_topk_forward(x, float(k), alpha)
        want, _ = reference.soft_topk_forward(x.double(), float(k), alpha)
        assert (p - want).abs().max() <= 1e-6
    assert torch.equal(cpu.hard_topk_mask(x, float(k)), reference.hard_topk_mask(x, float(k)))


@pytest.mark.parametrize("n", [1500, 4096, 20_001])
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_a_sample_that_misleads(scale, n):
    """The search starts from elements at 128 fixed places (trials.h): here these tell nothing, or lies."""
    places = torch.arange(128) * (n // 128) + n % 128 * torch.arange(128) // 128
    x = make("normal", 7, n) * scale
    sampled = x[:, places]
    x[1, places], x[2, places], x[3, places] = sampled[1] + 1, sampled[2] - 0.4, sampled[3] * 0.01
    x[4, places] = 0.3 * (torch.arange(128) % 2)  # two values, and nothing of the row near the root
    x[5] = torch.where(x[5] > 0, x[5] + 1, x[5] - 1)
    x[6] = (x[6] * 20).round() / 20
    for share in (0.01, 0.125, 0.5, 0.9):
        for alpha in (1.0, 0.1, 1e-2, 1e-4):
            got, solution = cpu.soft_topk_forward(x, n * share + 0.3, alpha)
            want, _ = reference.soft_topk_forward(x.double(), n * share + 0.3, alpha)
            assert (got - want).abs().max() <= 1e-6
            split = solution[:, :2].isinf() | (x[:, None] == solution[:, :2, None]).any(2)
            assert split.all()  # r_A and r_B are elements


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has three sets of sweeps")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The choice is made once in a process; a set that the machine lacks falls back to a smaller one."""
    script = """
from functools import partial
import torch
from softtopk.backends import cpu, reference
from tests.accuracy import FORMS, oracle, ratios, run
from tests.cases import BAR_FAMILIES, make
for family in BAR_FAMILIES:
    for n in (31, 3000):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, k = make(family, 4, n).to(dtype), torch.tensor([0.5, 7, n / 2, n - 0.5])
            v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            for alpha in (1.0, 1e-2, 1e-4):
                for form in FORMS:
                    got, want = (f(x, k, alpha, v, form=form) for f in (partial(run, cpu), oracle))
                    worst = ratios(got, want, k, alpha, v, form)
                    if dtype == torch.float32:
                        assert max(worst.values()) <= 1, (form, family, n, alpha, worst)
                    assert worst["grad_k"] <= 1, (form, family, n, alpha, worst)
                    rounded = want.p.to(dtype).double()  # to -inf too
                    error = torch.where(got.p == rounded, 0, got.p - rounded).abs()
                    assert (error <= (torch.finfo(dtype).eps + 1e-6) * rounded.abs().clamp(min=1)).all()
            assert torch.equal(cpu.hard_topk_mask(x, k), reference.hard_topk_mask(x, k))
            for got, want in zip(cpu.hard_topk_indices(x, k, 9), reference.hard_topk_indices(x, k, 9)):
                assert torch.equal(got, want)
"""
    environment = {**os.environ, "SOFTTOPK_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)
