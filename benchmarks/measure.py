"""Checks and times the cells of bars.py that work on large data: all of one x together, so that x, the
copy that is the floor, and the peers are paid for once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

import softtopk
from benchmarks.bars import PEER_ALPHA, Cell
from benchmarks.features import one_line
from benchmarks.implementations import Absent
from benchmarks.speed_peers import Peer, Problem, wrong
from benchmarks.timing import median_ms
from softtopk import dispatch
from softtopk.backends import reference
from tests.cases import make

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DISTINCT = 16  # rows of the distributions that are drawn on the CPU; they are repeated
FLOORS = {"forward": 1.0, "backward": 1.5, "forward+backward": 2.5}  # in copies of x
WRONG = 1e30  # an error that JSON can hold, for a result with a NaN


def draw(distribution: str, rows: int, n: int, dtype: str, device: str) -> Tensor:
    """Rows of a family of tests/cases.py; relu, which most cells use, is drawn on the device."""
    if distribution == "relu":
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(rows, n, device=device, generator=generator).relu_().to(TORCH[dtype])
    x = make(distribution, DISTINCT, n).to(device, TORCH[dtype])
    return x.repeat(-(-rows // DISTINCT), 1)[:rows]


def budgets(label: str, rows: int, n: int, device: str) -> Tensor:
    """k of each row, float32, from its label: "20..120", "n/8" or "64"."""
    if label == "20..120":
        generator = torch.Generator(device).manual_seed(1)
        return torch.randint(20, 121, (rows,), device=device, generator=generator).float()
    k = n // int(label.removeprefix("n/")) if label.startswith("n/") else int(label)
    return torch.full((rows,), float(k), device=device)


def worst(error: Tensor) -> float:
    return error.nan_to_num(WRONG, posinf=WRONG).max().item()


def soft_errors(kernels: ModuleType, problem: Problem) -> tuple[dict[str, float], Tensor]:
    """Errors of p and grad_x as bars.ERRORS has them, on the first and last rows against the reference in
    float64, and the solution."""
    x, k, alpha, v = problem.x, problem.k, problem.alpha, problem.v
    p, solution = kernels.soft_topk_forward(x, k, alpha, True)
    grad_x, *_ = kernels.soft_topk_backward(x, solution, alpha, v, True)
    pick = sorted({0, x.shape[0] - 1})
    exact_x, exact_k, exact_v = (t[pick].double() for t in (x, k, v))
    want_p, exact_solution = reference.soft_topk_forward(exact_x, exact_k, alpha, True)
    want_x, *_ = reference.soft_topk_backward(exact_x, exact_solution, alpha, exact_v, True)
    scale = want_x.abs().amax(1, keepdim=True).clamp(min=1e-30 / alpha)
    errors = {
        "forward": worst((p[pick].double() - want_p).abs()),
        "backward": worst((grad_x[pick].double() - want_x).abs() / scale),
    }
    return errors | {"forward+backward": errors["backward"]}, solution


def hard_error(backend: str, x: Tensor, k: int) -> float:
    """How many values and indices of the first and last rows differ from the reference's."""
    pick = [0, -1]
    got = softtopk.hard_topk(x, k, return_indices=True, backend=backend)
    want = softtopk.hard_topk(x[pick], k, return_indices=True, backend="reference")
    return float(sum((g[pick] != w).sum().item() for g, w in zip(got, want, strict=True)))


def soft_calls(backend: str, problem: Problem, solution: Tensor) -> dict[str, partial]:
    """By pass. Both together are timed as a user calls them, autograd included."""
    kernels = dispatch.module(backend)
    x, k, alpha, v = problem.x, problem.k, problem.alpha, problem.v
    leaves = tuple(t.detach().requires_grad_() for t in (x, k))

    def both():
        p = softtopk.soft_topk(*leaves, alpha, backend=backend)
        return torch.autograd.grad(p, leaves, v)

    return {
        "forward": partial(kernels.soft_topk_forward, x, k, alpha, True),
        "backward": partial(kernels.soft_topk_backward, x, solution, alpha, v, True),
        "forward+backward": both,
    }


def peer_times(
    peers: list[Peer], problem: Problem, device: str, wanted: set[str]
) -> dict[str, dict[str, float]]:
    """Milliseconds by what a peer does, of that which is wanted, and its name."""
    times: dict[str, dict[str, float]] = {}
    where = f"at {tuple(problem.x.shape)}, {problem.x.dtype}"
    for peer in peers:
        try:
            calls = {what: call for what, call in peer.calls(problem).items() if what in wanted}
            if calls and (reason := wrong(peer, problem)):
                print(f"  {reason} {where}")
                continue
        except Absent:
            continue
        except Exception as error:  # it cannot do this dtype or length
            print(f"  {peer.name} {where}: {one_line(error)}")
            continue
        for what, call in calls.items():
            try:
                ms = median_ms(call, device, least=1, most=10)
                times.setdefault(what, {})[peer.name] = round(ms, 5)
            except Exception as error:  # or only a part, or not in this memory
                print(f"  {peer.name}, {what} {where}: {one_line(error)}")
    return times


def measured(cell: Cell, ms: float, floor: float, error: float, peers: dict[str, float]) -> dict:
    return {
        **cell.keys(),
        **{"ms": round(ms, 5), "floor_ms": round(floor, 5), "fraction": round(floor / ms, 4)},
        **{"max_error": error, "peers": peers},
    }


def failed(cell: Cell, error: Exception) -> dict:
    nothing = dict.fromkeys(("ms", "floor_ms", "fraction", "max_error"))
    return {**cell.keys(), **nothing, "peers": {}, "error": one_line(error)}


def same_data(cell: Cell) -> tuple:
    return cell.n, cell.rows, cell.dtype, cell.distribution


def copy_ms(x: Tensor, device: str) -> float:
    """The fastest copy: where its result lies beside x decides by up to a tenth."""
    if device == "cpu":
        return median_ms(partial(torch.empty_like(x).copy_, x), device)
    step = (5 << 18) // x.element_size()
    room = torch.empty(x.numel() + 3 * step, dtype=x.dtype, device=device)
    places = (room[offset : offset + x.numel()].view_as(x) for offset in (0, step, 3 * step))
    return min(median_ms(partial(place.copy_, x), device) for place in places)


def of_one_x(cells: list[Cell], peers: list[Peer], device: str) -> Iterator[dict]:
    """The rows of cells that share x (`same_data`)."""
    first = cells[0]
    x = draw(first.distribution, first.rows, first.n, first.dtype, device)
    v = torch.randn(x.shape, device=device, generator=torch.Generator(device).manual_seed(2)).to(x.dtype)
    copy = copy_ms(x, device)
    hard = {}
    if any(c.section in ("headline", "hard", "cpu") for c in cells):
        k = budgets("20..120", first.rows, first.n, device)
        hard = peer_times(peers, Problem(x, k, PEER_ALPHA, v), device, {"top-k"}).get("top-k", {})
    passes = {c.run for c in cells}  # a GPU has no cell for both together
    beside: dict[float, dict[str, dict[str, float]]] = {}  # soft peers by alpha

    def peers_of(cell: Cell, problem: Problem) -> dict[str, float]:
        if cell.section not in ("headline", "cpu"):
            return {}
        alpha = PEER_ALPHA if device != "cpu" else cell.alpha
        if alpha not in beside:
            beside[alpha] = peer_times(peers, Problem(x, problem.k, alpha, v), device, passes)
        return (hard if cell.run == "forward" else {}) | beside[alpha].get(cell.run, {})

    for label, backend, alpha in dict.fromkeys((c.k, c.backend, c.alpha) for c in cells):
        chosen = [c for c in cells if (c.k, c.backend, c.alpha) == (label, backend, alpha)]
        if chosen[0].op == "hard_topk":
            try:
                error = hard_error(backend, x, int(label))
                call = partial(softtopk.hard_topk, x, int(label), return_indices=True, backend=backend)
                ms = median_ms(call, device)
                yield measured(chosen[0], ms, copy / 2, error, dict(hard))
            except Exception as error:
                yield failed(chosen[0], error)
            continue
        problem = Problem(x, budgets(label, first.rows, first.n, device), alpha, v)
        try:
            errors, solution = soft_errors(dispatch.module(backend), problem)
            calls = soft_calls(backend, problem, solution)
            times = {run: median_ms(calls[run], device) for run in dict.fromkeys(c.run for c in chosen)}
        except Exception as error:  # the row says so, and the rest is measured
            yield from (failed(cell, error) for cell in chosen)
            continue
        for cell in chosen:
            floor = copy * FLOORS[cell.run]
            yield measured(cell, times[cell.run], floor, errors[cell.run], peers_of(cell, problem))
