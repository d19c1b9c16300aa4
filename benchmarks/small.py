"""Problems so small that launches, latency and the host decide: bars.py's sections small and overhead,
and the sweeps over n and over the number of rows that plots.py draws."""

from __future__ import annotations

from functools import partial

import torch

import softtopk
from benchmarks.bars import ITEMSIZE, TOPK, Cell
from benchmarks.measure import FLOORS, draw, failed, measured, soft_errors
from benchmarks.speed_peers import K, Problem
from benchmarks.timing import graph_ms, host_ms, median_ms, row_of_calls_ms
from softtopk import dispatch

CALLS = 20  # in a row
SWEEP_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}
SWEEP_SLICES = 2048
SWEEP_LENGTHS = tuple(4**i for i in range(3, 11))  # 64 ... 1,048,576
SWEEP_N, SWEEP_ROWS = 16384, {"cuda": tuple(4**i for i in range(9)), "cpu": tuple(4**i for i in range(5))}


def small(cell: Cell, device: str) -> dict:
    """Calls of the public functions on rows that stay in the cache, as those of torch.topk do."""
    x = draw(cell.distribution, cell.rows, cell.n, cell.dtype, device)
    k = torch.full((cell.rows,), float(K), device=device)
    try:
        error = soft_errors(dispatch.module(cell.backend), Problem(x, k, cell.alpha, x))[0]["forward"]
        ours = partial(softtopk.soft_topk, x, K, cell.alpha, backend=cell.backend)
        time = graph_ms if cell.run == "graph" else row_of_calls_ms
        ms, topk = (time([call] * CALLS) for call in (ours, partial(torch.topk, x, K)))
        floor = time([partial(torch.empty_like(x).copy_, x)] * CALLS)
    except Exception as error:
        return failed(cell, error)
    return measured(cell, ms, floor, error, {TOPK: round(topk, 5)})


def overhead(cell: Cell, device: str) -> dict:
    """How long one call of soft_topk holds the host up, with numbers, or with gradients to x and k."""
    x = draw(cell.distribution, cell.rows, cell.n, cell.dtype, device)
    k = K
    if cell.run == "forward, gradients":
        x, k = x.requires_grad_(), torch.full((cell.rows,), float(K), device=device, requires_grad=True)
    try:
        ms = host_ms(partial(softtopk.soft_topk, x, k, cell.alpha, backend=cell.backend))
        topk = host_ms(partial(torch.topk, x, K))
    except Exception as error:
        return failed(cell, error)
    nothing = {"floor_ms": None, "fraction": None, "max_error": None}
    return {**cell.keys(), "ms": round(ms, 5), **nothing, "peers": {TOPK: round(topk, 5)}}


def sweep_cells(device: str, backends: list[str]) -> list[Cell]:
    """Cost against n with the same bytes, and against the number of rows of one length."""
    found = []
    for backend in [*backends, "torch"]:
        op = "torch.topk" if backend == "torch" else "soft_topk"
        alpha = None if backend == "torch" else 1e-2
        for run in ("forward",) if backend == "torch" else ("forward", "backward"):
            at = (op, run, backend, "float32")
            for n in SWEEP_LENGTHS:
                rows = max(1, SWEEP_BYTES[device] // (4 * n))
                found.append(Cell("sweep_n", *at, rows, n, str(min(K, n // 2)), alpha, bar=False))
            for rows in SWEEP_ROWS[device]:
                found.append(Cell("sweep_rows", *at, rows, SWEEP_N, str(K), alpha, bar=False))
    return found


def sweep(cell: Cell, device: str) -> dict:
    """One point: the median of calls on data that is not in the cache. Less than SWEEP_BYTES take turns
    over slices of a larger buffer and, on a GPU, are replayed from a graph, since events cannot time a
    launch of microseconds."""
    k = int(cell.k)
    bytes_of_x = cell.rows * cell.n * ITEMSIZE[cell.dtype]
    slices = max(1, min(SWEEP_SLICES, SWEEP_BYTES[device] // bytes_of_x))

    def time(calls: list) -> float:
        return graph_ms(calls) if device == "cuda" and slices > 1 else median_ms(calls, device)

    try:
        large = draw(cell.distribution, cell.rows * slices, cell.n, cell.dtype, device)
        pieces = large.split(cell.rows)
        copy = time([partial(torch.empty_like(pieces[0]).copy_, x) for x in pieces])
        if cell.backend == "torch":
            return measured(cell, time([partial(torch.topk, x, k) for x in pieces]), copy, 0.0, {})
        kernels = dispatch.module(cell.backend)
        budgets = torch.full((cell.rows,), float(k), device=device)
        gradients = torch.randn_like(large).split(cell.rows)
        errors, _ = soft_errors(kernels, Problem(pieces[0], budgets, cell.alpha, gradients[0]))
        calls = [partial(kernels.soft_topk_forward, x, budgets, cell.alpha, True) for x in pieces]
        if cell.run == "backward":
            solutions = [call()[1] for call in calls]
            calls = [
                partial(kernels.soft_topk_backward, x, solution, cell.alpha, v, True)
                for x, solution, v in zip(pieces, solutions, gradients, strict=True)
            ]
        return measured(cell, time(calls), copy * FLOORS[cell.run], errors[cell.run], {})
    except Exception as error:
        return failed(cell, error)
