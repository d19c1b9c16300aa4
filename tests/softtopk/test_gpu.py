"""Both GPU backends behind the public functions: no waiting, no hidden memory, streams, graphs, devices."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.func import jvp

import softtopk
from softtopk import SoftTopK, hard_topk, log_soft_topk, soft_topk
from tests.cases import make

pytestmark = pytest.mark.gpu
MIB = 1 << 20
FUNCTIONS = {
    "p": soft_topk,
    "hard": functools.partial(soft_topk, hard=True),
    "log": log_soft_topk,
    "log_complement": functools.partial(log_soft_topk, complement=True),
}


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    if (reason := softtopk.available_backends()[request.param]) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(params=FUNCTIONS)
def function(request, backend):
    return functools.partial(FUNCTIONS[request.param], backend=backend)


@pytest.fixture
def sync_is_an_error():
    torch.cuda.synchronize()
    yield lambda on=True: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


def problem(rows: int, n: int, dtype=torch.float32, device="cuda") -> tuple[Tensor, ...]:
    """x, k, alpha that require gradients, and v."""
    x = make("normal", rows, n).to(device, dtype).requires_grad_()
    k = torch.linspace(0.5, 0.6 * n, rows, device=device).requires_grad_()
    alpha = torch.logspace(-3, 0, rows, device=device).requires_grad_()
    return x, k, alpha, make("normal", rows, n, 1).to(device, dtype)


def forward_backward(function, x: Tensor, k, alpha, v: Tensor) -> list[Tensor]:
    y = function(x, k, alpha)
    leaves = [t for t in (x, k, alpha) if isinstance(t, Tensor) and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, v)]


def assert_same(got: list[Tensor], want: list[Tensor]):
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"output {place} differs")


def test_nothing_waits_for_the_device(function, backend, sync_is_an_error):
    x, k, alpha, v = problem(8, 3000)
    integer_k = torch.arange(1, 9, device="cuda")
    module = SoftTopK(0.1, fraction=True, relative=True, learn_k=True, learn_alpha=True, backend=backend)
    module.cuda()
    for check in (False, True):  # the first round loads and compiles
        sync_is_an_error(check)
        forward_backward(function, x, k, alpha, v)
        forward_backward(function, x, 12.5, 0.1, v)
        forward_backward(function, x, integer_k, 0.1, v)
        y = function(x.t(), 2, 0.1, dim=0)
        torch.autograd.grad(y, x, v.t(), create_graph=True)[0].square().sum().backward()
        jvp(lambda x, k: function(x, k, 0.1), (x.detach(), k.detach()), (v, k.detach()))
        soft_topk(x, k, alpha, return_threshold=True, backend=backend)
        hard_topk(x, k, max_k=9, return_indices=True, backend=backend)
        hard_topk(x, 9, return_indices=True, backend=backend)
        hard_topk(x, k, backend=backend)
        module(x).sum().backward()
    sync_is_an_error(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_x_p_v_and_grad_x(function, dtype):
    x, k, alpha, v = problem(8192, 4096, dtype)
    forward_backward(function, x[:64], k[:64], alpha[:64], v[:64])  # loads and compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(function, x, k, alpha, v)
    outputs = 2 * x.numel() * x.element_size()  # p and grad_x; x and v were there before
    assert torch.cuda.max_memory_allocated() - before <= outputs + 0.01 * 2 * outputs


def test_strided_views_need_little_more_memory(function):
    """dim = 0: 512 MiB of x pass in slabs, not as a copy."""
    x, k, alpha, v = problem(32768, 4096)
    turned, turned_v = x.detach().t().contiguous().requires_grad_(), v.t().contiguous()
    want = forward_backward(function, x, k, alpha, v)
    along = functools.partial(function, dim=0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = forward_backward(along, turned, k, alpha, turned_v)
    extra = torch.cuda.max_memory_allocated() - before - 2 * x.numel() * 4
    assert extra <= 6 * 32 * MIB
    assert_same([got[0].t(), got[1].t(), *got[2:]], want)


def test_streams_change_no_bit(function):
    arguments = problem(64, 4099)
    want = forward_backward(function, *arguments)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(3):
        got = []
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(forward_backward(function, *arguments))
        torch.cuda.synchronize()
        for one in got:
            assert_same(one, want)


def test_results_wait_for_their_own_stream_only(function):
    x, k, alpha, v = problem(64, 4096)
    want = forward_backward(function, x, k, alpha, v)
    late = torch.zeros_like(x).requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        forward_backward(function, x, k, alpha, v)  # gives the allocator what it needs on this stream
        side.synchronize()
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late.copy_(x)
        got = forward_backward(function, late, k, alpha, v)
        assert not side.query()
    side.synchronize()
    assert_same(got, want)


@pytest.mark.parametrize("n", [40, 4096, 70001])
def test_graph_of_forward_and_backward(function, n):
    """Autograd's own call captured whole, replayed on other data."""
    x, k, alpha, v = problem(8, n)
    x2 = make("relu", 8, n, 5).cuda().requires_grad_()
    want = forward_backward(function, x2, k, alpha, v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward(function, x, k, alpha, v)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward_backward(function, x, k, alpha, v)
    with torch.no_grad():
        x.copy_(x2)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, want)


def test_graphed_callable(backend):
    module = SoftTopK(3.0, 0.2, learn_k=True, learn_alpha=True, backend=backend).cuda()
    x = torch.randn(16, 200, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(module, (torch.randn_like(x).requires_grad_(),))
    v = torch.randn_like(x)
    want = torch.autograd.grad(soft_topk(x, 3.0, 0.2, backend=backend), x, v)[0]
    torch.testing.assert_close(torch.autograd.grad(graphed(x), x, v)[0], want, rtol=1e-5, atol=1e-6)


def test_the_device_of_the_tensor_counts(function):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    want = forward_backward(function, *problem(8, 3000))
    for other in ("cuda:1", "cuda:0"):
        with torch.cuda.device(1 if other == "cuda:0" else 0):
            current = torch.cuda.current_device()
            arguments = problem(8, 3000, device=other)
            got = forward_backward(function, *arguments)
            y = function(arguments[0].t(), 2, 0.1, dim=0)
            mask = hard_topk(arguments[0], 9, backend=function.keywords["backend"])
            assert torch.cuda.current_device() == current
        assert all(str(t.device) == other for t in (*got, y, mask))
        assert_same([t.to("cuda:0") for t in got], want)


@pytest.mark.parametrize(("rows", "n"), [(300_000, 5), (70_000, 2100), (1_100_000, 2049), (3, 1 << 20)])
def test_scale(backend, rows, n):
    """More than 65,535 rows, more than 2^31 elements, rows of a million elements."""
    if rows * n * 2 * 4 > torch.cuda.mem_get_info()[0]:
        pytest.skip("not enough GPU memory")
    x = make("normal", 1, n).cuda().bfloat16()
    one = forward_backward(functools.partial(soft_topk, backend=backend), x.requires_grad_(), 2.5, 0.1, x)
    many = x.detach().expand(rows, n).requires_grad_()
    p = soft_topk(many, 2.5, 0.1, backend=backend)
    assert (p == one[0]).all()
    (grad_x,) = torch.autograd.grad(p, many, many.detach())
    assert (grad_x == one[1]).all()
