"""What is particular to the CUDA backend: layouts, alignment, grids, streams, graphs, no waiting.

Accuracy over families of rows is test_accuracy.py's. Results here are compared with the reference
in float64, or bit for bit with the same rows computed another way.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import softtopk
from softtopk.backends import reference
from tests.accuracy import FORMS, LOG_FORMS, oracle, ratios, run, units_in_last_place
from tests.cases import make

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# 16-byte chunks at which csrc/cuda/launch.cuh's with_layout and resident_launch.cuh's plan_resident change
# over: warps, blocks of 128 and 256 threads, clusters, for one array kept and for two.
LAYOUT_CHUNKS = (64, 128, 256, 512, 1024, 2048, 4096)


@pytest.fixture
def cuda():
    reason = softtopk.available_backends()["cuda"]
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    from softtopk.backends import cuda

    return cuda


def inputs(rows: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """x, k, alpha and v on the GPU; k and alpha differ from row to row."""
    x = make("relu", rows, n, seed).to(dtype)
    v = make("normal", rows, n, seed + 1).to(dtype)
    k = torch.linspace(0.3 * min(n, 40), 0.6 * n, rows)
    alpha = torch.logspace(-4, 0, rows)
    return x.cuda(), k.cuda(), alpha.cuda(), v.cuda()


def everything(cuda, x: Tensor, k, alpha, v: Tensor, largest: bool = True) -> list[Tensor]:
    """The outputs of all four functions, those of the log domain last."""
    p, solution = cuda.soft_topk_forward(x, k, alpha, largest)
    gradients = cuda.soft_topk_backward(x, solution, alpha, v, largest)
    mask = cuda.hard_topk_mask(x, k, largest)
    logs = []
    for form in LOG_FORMS:
        logs.append(cuda.soft_topk_forward(x, k, alpha, largest, form)[0])
        logs.extend(cuda.soft_topk_backward(x, solution, alpha, v, largest, form))
    return [p, solution, *gradients, mask, *cuda.hard_topk_indices(x, k, 20, largest), *logs]


def assert_same(got: list[Tensor], want: list[Tensor]):
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"output {place} differs"


def assert_the_same_without_a_solution(cuda, x: Tensor, k, alpha, largest: bool = True):
    """The marks of the rows that are left are in p where nobody reads the solution."""
    want, _ = cuda.soft_topk_forward(x, k, alpha, largest)
    p, nothing = cuda.soft_topk_forward(x, k, alpha, largest, solved=False)
    assert nothing is None
    torch.testing.assert_close(p, want, rtol=0, atol=0, equal_nan=True)


def assert_right(cuda, x: Tensor, k, alpha, v: Tensor, largest: bool = True):
    """All four functions against the reference, soft ones in float64."""
    solution = None
    for form in FORMS:
        want = oracle(x, k, alpha, v, largest, form)
        got = run(cuda, x, k, alpha, v, largest, form)
        worst = ratios(got, want, k, alpha, v, form)
        if x.dtype in (torch.float16, torch.bfloat16):
            p = cuda.soft_topk_forward(x, k, alpha, largest, form)[0].cpu()
            assert units_in_last_place(p, want.p).max() <= 1
            worst = {name: worst[name] for name in ("grad_k", "grad_alpha")}
        if x.dtype == torch.float64:
            scale = x.double().abs().amax(1).cpu() / torch.as_tensor(alpha).double().cpu()
            error = ((got.p - want.p).abs() / want.p.abs().clamp(min=1)).amax(1)
            assert (error <= 1e-12 + 4 * torch.finfo(torch.float64).eps * scale).all()
        assert all(r <= 1 for r in worst.values()), f"{form}, times the bar: {worst}"
        assert solution is None or torch.equal(got.solution, solution)
        solution = got.solution
    assert_the_same_without_a_solution(cuda, x, k, alpha, largest)
    nothing, alone = cuda.soft_topk_forward(x, k, alpha, largest, "none")
    assert nothing is None and torch.equal(alone.cpu().double(), solution)
    mask = cuda.hard_topk_mask(x, k, largest)
    assert torch.equal(mask, reference.hard_topk_mask(x, k, largest))
    for max_k in (1, 20, x.shape[1]):
        values, indices, counts = cuda.kernels.hard_topk_selected(x, k, max_k, largest)
        want_indices, want_counts = reference.hard_topk_indices(x, k, max_k, largest)
        assert torch.equal(indices, want_indices) and torch.equal(counts, want_counts)
        want = torch.where(want_indices < 0, 0, x.gather(1, want_indices.clamp(min=0)))
        assert torch.equal(values, want) and torch.equal(values.signbit(), want.signbit())


@pytest.mark.parametrize("step", [-1, 0, 1])
@pytest.mark.parametrize("chunks", LAYOUT_CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_layouts_change(cuda, dtype, chunks, step):
    n = chunks * (16 // dtype.itemsize) + step
    assert_right(cuda, *inputs(5, n, dtype), largest=step != 1)


@pytest.mark.parametrize("chunks", [1280, 1536, 2560, 3072, 3584])
def test_where_shared_memory_passes_48_kb(cuda, chunks):
    for n in (4 * chunks, 4 * chunks + 1):
        assert_right(cuda, *inputs(3, n))


@pytest.mark.parametrize("arrays", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_shared_memory_ends(cuda, dtype, arrays):
    """The last length that fits, and the first that is read again on every sweep."""
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    step = 512 * 16 * arrays  # bytes: a block of 512 threads keeps whole rounds of chunks
    fits = (limit - 2 * 16 * 64) // step * 512 * (16 // dtype.itemsize)
    for n in (fits, fits + 1):
        assert_right(cuda, *inputs(3, n, dtype))


@pytest.mark.parametrize(
    "n",
    [
        *(12288, 24576, 24577, 28672, 28673, 32769, 40960, 50256, 50257, 57344, 65536, 65537, 98304),
        *(131072, 131073, 196608, 262144, 458753, 524288, 524289),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_clusters_grow_and_end(cuda, dtype, n):
    """A row in a block that has a multiprocessor for itself or shares it, shared out over 2, 4, 8 and 16, and
    the first that no cluster holds."""
    assert_right(cuda, *inputs(3, n, dtype))


@pytest.mark.parametrize("n", [1100, 4096, 16385, 40000, 131072])
def test_rows_that_the_quick_kernels_leave(cuda, n):
    """Rows between usual ones with what csrc/cuda/quick_forward.cuh does not do: NaN, infinite elements, more
    ties than candidates, k out of range or large, alpha beyond the range of 1 / alpha."""
    x, _, _, v = inputs(14, n)
    x[1, n // 2] = torch.nan
    x[2, 5], x[3] = torch.inf, -torch.inf
    x[3, : n // 50] = make("normal", 1, n // 50).cuda()
    x[4, : n // 2] = 3.0
    x[5, ::2], x[6] = 1e30, 0.25
    k = torch.tensor([30, 20, 20, 20.5, 40, 12, 33.3, 0, -1, n, n + 2, n / 3, n - 0.25, 25], device="cuda")
    alpha = torch.full((14,), 0.01, device="cuda")
    alpha[0], alpha[13] = 1e-40, 1e37
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_the_same_without_a_solution(cuda, x.to(dtype), k, alpha)
    want = oracle(x, k, alpha, v)
    got = run(cuda, x, k, alpha, v)
    for name, bar in (("p", 1e-6), ("grad_k", 1e-5 * v.abs().max().item())):
        a, b = getattr(got, name), getattr(want, name)
        assert torch.equal(a.isnan(), b.isnan()), name
        assert ((a - b).nan_to_num().abs() <= bar).all(), name
    for max_k in (20, 130):
        found, expected = (m.hard_topk_indices(x, k, max_k) for m in (cuda, reference))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_without_clusters_and_bulk_copies(cuda):
    """The path of GPUs before sm_90, in a process that is told to take it."""
    chosen = "where_layouts_change or 20001 or 70001 or shared_memory_ends or quick_kernels_leave"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = os.environ | {"SOFTTOPK_CUDA_PATH": "generic"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout[-3000:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(cuda, dtype):
    assert_right(cuda, *inputs(2, 2**20 + 3, dtype))


@pytest.mark.parametrize("n", [7, 250, 1001, 4099, 20001, 70001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_changes_no_bit(cuda, dtype, n):
    x, k, alpha, v = inputs(4, n, dtype)
    width = -(-(n + 1) // 8) * 8  # a stride that is a multiple of 16 bytes
    want = None
    for first in (0, 1):
        wide = torch.zeros(4, width, dtype=dtype, device="cuda")
        wide_v = torch.zeros_like(wide)
        wide[:, first : first + n], wide_v[:, first : first + n] = x, v
        got = everything(cuda, wide[:, first : first + n], k, alpha, wide_v[:, first : first + n])
        want = want or got
        assert_same(got, want)
    assert_same(everything(cuda, x, k, alpha, v), want)  # rows of stride n


@pytest.mark.parametrize("n", [3, 250, 1001, 4095, 5000, 24577, 50257, 70001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_position_changes_no_bit(cuda, dtype, n):
    x, k, alpha, v = inputs(9, n, dtype)
    order = torch.tensor([8, 3, 0, 1, 7, 2, 6, 5, 4], device="cuda")
    want = everything(cuda, x, k, alpha, v)
    assert_same(everything(cuda, x, k, alpha, v), want)
    shuffled = everything(cuda, x[order], k[order], alpha[order], v[order])
    assert_same(shuffled, [t[order] for t in want])


@pytest.mark.parametrize("n", [2056, 4095, 5000, 21000, 21001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_leaves_behind(cuda, dtype, n):
    """Negative rows that share a block's memory with earlier rows, of lengths that do not fill it."""
    rows = 8000
    row = -torch.rand(1, n, device="cuda").to(dtype)
    x = torch.cat([torch.randn(rows, n, device="cuda").relu_().to(dtype), row.expand(rows, n)])
    want, _ = cuda.soft_topk_forward(row, 64, 1e-4)
    got, _ = cuda.soft_topk_forward(x, 64, 1e-4)
    assert torch.equal(got[rows:], want.expand(rows, n))


@pytest.mark.parametrize("n", [5, 2100, 70001])
def test_rows_of_stride_0(cuda, n):
    x, k, alpha, v = inputs(6, n)
    shared, shared_v = x[1:2].expand(6, n), v[2:3].expand(6, n)
    got = everything(cuda, shared, k, alpha[:1].expand(6), shared_v)
    assert_same(got, everything(cuda, shared.contiguous(), k, alpha[:1].repeat(6), shared_v.contiguous()))


@pytest.mark.parametrize(("rows", "n"), [(300_000, 5), (70_000, 2100), (1_100_000, 2049)])
def test_many_rows(cuda, rows, n):
    """Grids beyond 65,535 blocks; the last case has more than 2^31 elements."""
    if rows * n * 2 * 3 > torch.cuda.mem_get_info()[0]:
        pytest.skip("not enough GPU memory")
    x, _, _, v = (t[-1:] if isinstance(t, Tensor) else t for t in inputs(2, n, torch.bfloat16))
    one = everything(cuda, x, 2.5, 0.1, v)
    p, solution = cuda.soft_topk_forward(x.expand(rows, n), 2.5, 0.1)
    assert (p == one[0]).all() and (solution == one[1]).all()
    grad_x, grad_k, grad_alpha = cuda.soft_topk_backward(x.expand(rows, n), solution, 0.1, v.expand(rows, n))
    assert (grad_x == one[2]).all() and (grad_k == one[3]).all() and (grad_alpha == one[4]).all()
    del p, grad_x
    assert (cuda.hard_topk_mask(x.expand(rows, n), 2.5) == one[5]).all()


def test_empty_batch(cuda):
    x = torch.empty(0, 10, device="cuda")
    p, solution = cuda.soft_topk_forward(x, 2.0, 0.1)
    assert p.shape == (0, 10) and solution.shape == (0, 5)
    assert_the_same_without_a_solution(cuda, x, 2.0, 0.1)
    assert cuda.hard_topk_indices(x, 2.0, 3)[0].shape == (0, 3)


@pytest.mark.parametrize("n", [40, 4096, 70001])
def test_side_stream(cuda, n):
    """The kernels wait for their stream's earlier work, and nothing else waits for them."""
    x, k, alpha, v = inputs(64, n)
    want = everything(cuda, x, k, alpha, v)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        everything(cuda, x, k, alpha, v)  # gives the allocator what it needs on this stream
        side.synchronize()
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = everything(cuda, late, k, alpha, v)
        assert not side.query()  # enqueued behind the wait
    side.synchronize()
    assert_same(got, want)


def test_calls_in_flight_on_two_streams(cuda):
    batches = [inputs(200, 5000, seed=seed) for seed in (1, 2)]
    want = [everything(cuda, *batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    got: list[list[Tensor]] = [[], []]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i] = everything(cuda, *batches[i])
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("n", [40, 4096, 40000, 70001])
def test_graph_capture(cuda, n):
    x, k, alpha, v = inputs(8, n)
    other = inputs(8, n, seed=7)
    want = everything(cuda, *other)
    everything(cuda, x, k, alpha, v)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = everything(cuda, x, k, alpha, v)
    for held, new in zip((x, k, alpha, v), other, strict=True):
        held.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, want)


def test_current_device_is_restored(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = inputs(8, 3000)
    want = everything(cuda, *args)
    got = everything(cuda, *(t.to("cuda:1") for t in args))
    assert torch.cuda.current_device() == 0
    assert_same([t.to("cuda:0") for t in got], want)
