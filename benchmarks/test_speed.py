"""Quick times by pytest-benchmark, to see a regression before the speed table is measured again.

    pytest benchmarks                                        # in seconds
    pytest benchmarks --benchmark-autosave                   # and keep them in .benchmarks
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:15%

On every backend that runs here, without Triton's interpreter; 1 MiB of float32 on a CPU, 256 MiB on a GPU.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import softtopk
from benchmarks.measure import TORCH, budgets, draw
from softtopk import dispatch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BYTES = (1 << 28) if GPU else (1 << 20)
BACKENDS = ("cuda", "triton") if GPU else ("cpu",)
LENGTHS = (4096, 16384, 65536)


def time(benchmark, call) -> None:
    def finished():
        call()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=20, warmup_rounds=3)


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    reason = softtopk.available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(params=[(n, dtype) for n in LENGTHS for dtype in ("float32", "bfloat16")], ids=str)
def x(request) -> torch.Tensor:
    n, dtype = request.param
    return draw("relu", BYTES // (4 * n), n, dtype, DEVICE)


@pytest.mark.parametrize("alpha", [1.0, 1e-4])
def test_forward(benchmark, backend, x, alpha):
    k = budgets("20..120", *x.shape, DEVICE)
    time(benchmark, partial(dispatch.module(backend).soft_topk_forward, x, k, alpha, True))


@pytest.mark.parametrize("alpha", [1.0, 1e-4])
def test_backward(benchmark, backend, x, alpha):
    kernels = dispatch.module(backend)
    _, solution = kernels.soft_topk_forward(x, budgets("20..120", *x.shape, DEVICE), alpha, True)
    time(benchmark, partial(kernels.soft_topk_backward, x, solution, alpha, torch.randn_like(x), True))


def test_hard_topk(benchmark, backend, x):
    time(benchmark, partial(softtopk.hard_topk, x, 64, return_indices=True, backend=backend))


@pytest.mark.parametrize("rows", [1, 64])
def test_small(benchmark, backend, rows):
    x = torch.randn(rows, 4096, device=DEVICE, dtype=TORCH["float32"])
    time(benchmark, partial(softtopk.soft_topk, x, 64, 0.01, backend=backend))
