"""What is particular to the sparse path of the C++ backend: its functions against the reference's on unusual
inputs, threads, instruction sets, layouts, the caller's floating-point mode."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, inf, nan

import softtopk
from softtopk import dispatch
from softtopk.backends import reference_sparse as reference
from softtopk.backends.reference import compute_dtype

if (reason := softtopk.available_backends()["cpu"]) is not None:
    pytest.skip(f"cpu: {reason}", allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MODES = ["soft", "straight_through", "hard"]
cpu = dispatch.sparse_part("cpu")
TOLERANCES = {
    torch.float32: 5e-6,
    torch.float64: 1e-13,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def batch(dtype, rows: int, n: int) -> tuple[Tensor, ...]:
    """pre, k, alpha, bias, thresholds; rows of ordinary numbers."""
    g = torch.Generator().manual_seed(n)
    pre = torch.randn(rows, n, generator=g).to(dtype)
    k = torch.rand(rows, generator=g, dtype=torch.float64) * n / 3
    alpha = 10 ** -(4 * torch.rand(rows, generator=g))
    bias = (torch.randn(n, generator=g) / 4).to(dtype)
    return pre, k, alpha, bias, torch.rand(n, generator=g) / 2


def everything(dtype, rows: int, n: int, d: int, C: int) -> list[Tensor]:
    """What all the functions give for a batch; unspecified places left out."""
    pre, k, alpha, bias, thresholds = batch(dtype, rows, n)
    g = torch.Generator().manual_seed(d)
    weight, y = (torch.randn(size, d, generator=g).to(dtype) for size in (n, rows))
    incoming = torch.randn(rows, C, generator=g).to(compute_dtype(dtype))
    out = []
    for mode in MODES:
        code = cpu.code_forward(pre, k, alpha, bias, thresholds, mode, C)
        values, indices, active, counts, state = code
        out += [t for t in code if t is not None]
        if mode != "hard":
            given = values if mode == "straight_through" else None
            out += cpu.code_backward(active, given, counts, state, alpha, incoming, 0.5)
    offsets, entries = cpu.transpose(indices, counts, n)
    out += [offsets, entries[: offsets[-1]], cpu.decode(values, indices, counts, weight, weight[0])]
    for project in (False, True):
        out += cpu.latent_gradients(values, indices, offsets, entries, y, weight, dtype, True, True, project)
    return out


def assert_same_bits(got: list[Tensor], want: list[Tensor]):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_near(got: Tensor, want: Tensor, tolerance: float):
    """Relative to the largest element."""
    assert got.dtype == want.dtype and got.shape == want.shape
    largest = want.double().abs().max().item() if want.numel() else 0
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * largest, equal_nan=True)


# 1300 entries of a latent are three tasks, and 13 latents with few entries more than one.
SHAPES = [(37, 5000, 65, 1200), (1300, 13, 40, 13), (9, 700, 1, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype, shape, threads):
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(everything(dtype, *shape))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 5, 31, 700, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_code(dtype, n, mode):
    """Infinite elements and NaN, ties, none positive, k at its bounds, bad k and alpha; cut codes."""
    pre, k, alpha, bias, thresholds = batch(dtype, 16, n)
    if n > 4:
        pre[0, 1], pre[1, 2], pre[2], pre[3] = inf, nan, -1, 0.5
        pre[4, 0], pre[5, : n // 2], pre[6, 3:5] = -inf, 1.25, inf
    k[7], k[8], k[9], alpha[10], alpha[11], alpha[12] = 0, n, nan, 0, nan, 1e-40
    T, seen = compute_dtype(dtype), 0
    for activation in ((None, 0.0), (bias, 0.25), (bias, thresholds), (None, thresholds)):
        for C in (n, n // 3 + 1):
            arguments = pre, k, None if mode == "hard" else alpha, *activation, mode, C
            got, want = cpu.code_forward(*arguments), reference.code_forward(*arguments)
            # Not at a boundary: the same entries.
            for i in (1, 2, 3):
                torch.testing.assert_close(got[i], want[i], rtol=0, atol=0, equal_nan=True)
            finite = want[0].isfinite()
            assert torch.equal(got[0].isinf(), want[0].isinf())
            assert torch.equal(got[0].isnan(), want[0].isnan())
            error = ((got[0] - want[0]).abs() / want[2].abs().clamp(min=1e-30))[finite & (want[2] > 0)]
            assert (error <= TOLERANCES[T]).all()
            assert mode != "hard" or (got[4] is None and want[4] is None)
            seen += len(error)
    assert n < 5 or seen > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_that_misleads(dtype):
    """Far outliers make alpha look small against what is above a sample's quantile; the threshold lies below
    them, among thousands of elements less than alpha apart."""
    pre = 1 + torch.rand(4, 5000).to(dtype) / 100
    pre[:, ::50] = 10
    for alpha in (1e-2, 1e-3):
        got = cpu.code_forward(pre, 150.0, alpha, None, 0.0, "soft", 5000)
        want = reference.code_forward(pre, 150.0, alpha, None, 0.0, "soft", 5000)
        assert (want[3] > 4900).all() and torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("n", [5, 31, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_code_backward(dtype, n, mode):
    """From one state, against the reference in float64: rows as above, whole codes and cut ones."""
    pre, k, alpha, _, _ = batch(dtype, 16, n)
    pre[0, 1], pre[1, 2], pre[2], pre[3] = inf, nan, -1, 0.5
    pre[5, : n // 2], pre[6] = 1.25, pre[6] - 2  # few positive: zeros hold most of q
    k[7], k[8], alpha[9] = 0, n, nan
    for C in (n, n // 4 + 1):
        values, _, active, counts, state = reference.code_forward(pre, k, alpha, None, 0.0, mode, C)
        g = torch.randn(active.shape, dtype=dtype)
        g[torch.arange(C) >= counts.unsqueeze(1)] = nan  # not read
        mask = values if mode == "straight_through" else None
        for part in (0.0, 1.0, 0.3):
            got = cpu.code_backward(active, mask, counts, state, alpha, g, part)
            exact = [t if t is None else t.double() for t in (active, mask, state, alpha, g)]
            want = reference.code_backward(exact[0], exact[1], counts, exact[2], exact[3], exact[4], part)
            v = torch.where(active.isinf(), 0, g * active).nan_to_num().double()
            scales = want[0].nan_to_num().abs().amax(1, True), v.abs().amax(1), bound(exact, v)
            tolerances = (1e-5, 1e-5, 1e-4) if dtype == torch.float32 else (1e-11, 1e-11, 1e-10)
            for a, b, scale, tolerance in zip(got, want, scales, tolerances, strict=True):
                assert a.dtype == dtype and torch.equal(a.isnan(), b.isnan())
                assert ((a - b).abs().nan_to_num() <= tolerance * scale + 1e-30).all()


def bound(exact: list, v: Tensor) -> Tensor:
    """Of the error of grad_alpha: sum s (1 + |t|) |v|, with t from the anchor."""
    active, _, state, alpha, _ = exact
    row = reference.Solution(*state[:, :5].split(1, 1))
    scale = alpha.unsqueeze(1)
    _, _, h = reference.weights(active, row, reference.densities(row, scale), scale)
    t = torch.where(active.isinf(), 0, (active - reference.anchor(row)) / scale).abs()
    return (h / scale * (1 + t) * v.abs()).nan_to_num(0, 0, 0).sum(1)


def code_of(rows: int, n: int, C: int, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """values (NaN in unused places), indices, counts: empty, full and cut rows, latents of uneven numbers."""
    g = torch.Generator().manual_seed(rows)
    most = min(C, n)
    counts = torch.randint(0, most + 1, (rows,), generator=g, dtype=torch.int32)
    counts[0], counts[-1] = most, 0
    latents = (torch.rand(rows, n, generator=g) ** 3 + torch.linspace(1, 0, n)).argsort(1, descending=True)
    used = torch.arange(most) < counts.unsqueeze(1)
    indices = torch.where(used, latents[:, :most], n).sort(1).values
    indices = torch.nn.functional.pad(indices, (0, C - most), value=n).int()
    values = torch.randn(rows, C, generator=g).to(dtype)
    values[indices == n] = nan
    if most == C:
        counts[0] += 3  # a row that was cut
    return values, indices, counts


@pytest.mark.parametrize("shape", [(7, 50, 9, 33), (5, 300, 40, 768), (1300, 3, 3, 100), (2, 10, 12, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposition_decoding_gradients(dtype, shape):
    rows, n, C, d = shape
    T = compute_dtype(dtype)
    values, indices, counts = code_of(rows, n, C, T)
    g = torch.Generator().manual_seed(d)
    weight, bias, y = (torch.randn(size, d, generator=g) for size in (n, 1, rows))
    weight, bias, y = (weight / weight.norm(dim=1, keepdim=True)).to(dtype), bias[0].to(dtype), y.to(dtype)

    offsets, entries = cpu.transpose(indices, counts, n)
    want_offsets, want_entries = reference.transpose(indices, counts, n)
    assert torch.equal(offsets, want_offsets)
    assert torch.equal(entries[: offsets[-1]], want_entries[: offsets[-1]])
    for b in (None, bias):
        want = reference.decode(values, indices, counts, weight, b)
        assert_near(cpu.decode(values, indices, counts, weight, b), want, TOLERANCES[dtype])

    active = offsets.diff() > 0
    for w, project in ((None, False), (weight, False), (weight, True)):
        for out_dtype in {dtype, T}:
            arguments = values, indices, offsets, entries, y, w, out_dtype, True, True, project
            grad, *others = cpu.latent_gradients(*arguments)
            want_grad, *want_others = reference.latent_gradients(*arguments)
            assert_near(grad, want_grad, TOLERANCES[out_dtype])
            assert grad[~active].eq(0).all()
            for got, want in zip(others, want_others, strict=True):
                assert (got is None) == (want is None)
                if got is not None:
                    assert_near(got, want, TOLERANCES[T])
            kept = cpu.latent_gradients(*arguments, zero_silent=False)[0]
            assert torch.equal(kept[active], grad[active])


def test_silent_rows_are_left_alone():
    values, indices, counts = code_of(4, 60, 3, torch.float32)
    offsets, entries = cpu.transpose(indices, counts, 60)
    grad, y = torch.full((60, 8), 7.0), torch.randn(4, 8)

    class Reused(torch.Tensor):
        def new_empty(self, *size, **options):
            return grad if size == (60, 8) else torch.Tensor.new_empty(self, *size, **options)

    arguments = values, indices, offsets, entries, y.as_subclass(Reused), None, torch.float32, False, False
    got = cpu.latent_gradients(*arguments, zero_silent=False)[0]
    silent = offsets.diff() == 0
    assert got is grad and silent.any() and not silent.all()
    assert grad[silent].eq(7).all() and not grad[~silent].eq(7).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    pre, k, alpha, bias, thresholds = batch(dtype, 6, 300)
    wide = torch.zeros(6, 311, dtype=dtype)
    wide[:, 5:305] = pre
    want = cpu.code_forward(pre, k, alpha, bias, thresholds, "soft", 300)
    for strided in (wide[:, 5:305], pre.t().contiguous().t()):
        assert_same_bits(cpu.code_forward(strided, k, alpha, bias, thresholds, "soft", 300), want)
    two = torch.stack([bias, bias], 1)[:, 0], torch.stack([thresholds, thresholds], 1)[:, 1]
    assert_same_bits(cpu.code_forward(pre, k, alpha, *two, "soft", 300), want)


def test_flushing_of_denormals_changes_nothing():
    """The least positive activation is an entry, and tiny products are summed."""
    pre = torch.randn(3, 500)
    pre[0], pre[1, ::7] = 1e-42, 1e-45
    y = torch.randn(3, 16) * 1e-38

    def results() -> list[Tensor]:
        code = cpu.code_forward(pre, 250.0, 1e-3, None, 0.0, "soft", 500)
        values, indices, active, counts, state = code
        offsets, entries = cpu.transpose(indices, counts, 500)
        back = cpu.code_backward(active, None, counts, state, 1e-3, values, 1.0)
        gradients = cpu.latent_gradients(
            values, indices, offsets, entries, y, None, torch.float32, True, True
        )
        return [*code, *back, gradients[0], *gradients[2:]]

    want = results()
    assert want[3][0] == 500
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        got = results()
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, want)


def test_no_rows():
    pre = torch.empty(0, 5)
    values, indices, active, counts, state = cpu.code_forward(pre, 2.0, 0.1, None, 0.0, "soft", 4)
    assert values.shape == indices.shape == active.shape == (0, 4) and state.shape == (0, 7)
    assert cpu.code_backward(active, None, counts, state, 0.1, values, 1.0)[0].shape == (0, 4)
    offsets, entries = cpu.transpose(indices, counts, 5)
    assert offsets.tolist() == [0] * 6
    weight = torch.randn(5, 3)
    assert cpu.decode(values, indices, counts, weight, None).shape == (0, 3)
    arguments = values, indices, offsets, entries, torch.empty(0, 3), weight, torch.float32, True, True
    grad, dots, sums, squares = cpu.latent_gradients(*arguments)
    assert dots.shape == (0, 4) and not any(t.any() for t in (grad, sums, squares))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="has one instruction set")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_smaller_instruction_sets(isa):
    """The tests of this file that compare with the reference, on a set of sweeps that is not the default."""
    asked = "test_code or test_transposition_decoding_gradients"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", asked]
    environment = {**os.environ, "SOFTTOPK_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
