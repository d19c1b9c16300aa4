"""Checks and times the cells of sparse_bars.py: selection, decoding and its backward.

On a GPU a time is that of a call in a row of calls which a CUDA graph replays, on copies of the data taken
in turn, so that neither the host nor the L2 cache has a part in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.codes import TORCH, Latents, draw_budgets, draw_latents, draw_pre
from benchmarks.features import one_line
from benchmarks.sparse_bars import DENSE_TOPK, RELU_TOPK, Cell, room
from benchmarks.sparse_peers import Peer
from benchmarks.timing import graph_ms, median_ms, row_of_calls_ms
from softtopk import dispatch
from softtopk.backends import reference_sparse

ALPHA = 1e-4
MOST = 96  # the largest budget of "32..96"
BEYOND_CACHE = 1 << 29  # bytes that are gone through before data are read again
LEAST_CALLS = 10
ROWS_CHECKED = 4
PEER_ERROR = 0.05  # theirs have values rounded to bfloat16
WRONG = 1e30  # an error that JSON can hold, for a result with a NaN

Call = Callable[[], object]


def copies_for(size: int, device: str) -> int:
    """How many copies of data of so many bytes are taken in turn."""
    return 1 if device == "cpu" else max(2, min(16, -(-BEYOND_CACHE // max(size, 1))))


def device_ms(calls: list[Call], device: str, recorded: bool = True) -> float:
    """Milliseconds of one of the calls, which are taken in turn."""
    if device == "cpu":
        return median_ms(calls, device, budget_s=0.05, least=3)
    calls = list(itertools.islice(itertools.cycle(calls), max(LEAST_CALLS, len(calls))))
    if not recorded:
        return row_of_calls_ms(calls)
    for call in calls:  # everything is loaded and compiled before it is recorded
        call()
    return graph_ms(calls)


def copy_ms(source: list[Tensor], device: str) -> float:
    """Milliseconds of copying one of the tensors, by the fastest way: above some sizes a copy node of a CUDA
    graph is slower than the same copy outside of one, and either may be slower than a kernel that negates."""
    target = torch.empty_like(source[0])
    copies = [partial(target.copy_, x) for x in source]
    negations = [partial(torch.neg, x, out=target) for x in source]
    ways = [(copies, True), (copies, False), (negations, True)]
    return min(device_ms(calls, device, recorded) for calls, recorded in ways)


def bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB (on a CPU of 64 MiB)."""
    size = (1 << 26) if device == "cpu" else (1 << 30)
    x = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    return 2 * x.nbytes / (copy_ms([x], device) * 1e-3)


def worst(error: Tensor) -> float:
    return error.double().nan_to_num(WRONG, posinf=WRONG).max().item()


def scattered(values: Tensor, indices: Tensor, n: int) -> Tensor:
    """(rows, n) float64 of entries; an index n is no place."""
    dense = torch.zeros(len(values), n + 1, dtype=torch.float64, device=values.device)
    return dense.scatter_(1, indices.long(), values.double())[:, :n]


def measured(cell: Cell, ms: float, floor_ms: float, size: int, error: float | None, **more) -> dict:
    """A row. `size`: the bytes that have to be moved at the least, which take floor_ms."""
    return {
        **cell.keys(),
        **{"ms": round(ms, 5), "floor_ms": round(floor_ms, 5), "fraction": round(floor_ms / ms, 4)},
        **{"bytes": size, "max_error": error, "peers": {}},
        **more,
    }


def failed(cell: Cell, error: Exception) -> dict:
    nothing = dict.fromkeys(("ms", "floor_ms", "fraction", "bytes", "max_error"))
    return {**cell.keys(), **nothing, "peers": {}, "error": one_line(error)}


def peer_ms(name: str, calls: list[Call], device: str, recorded: bool = True) -> dict[str, float]:
    try:
        return {name: round(device_ms(calls, device, recorded), 5)}
    except Exception as error:  # it cannot do this shape or dtype, or not in this memory
        print(f"  {name}: {one_line(error)}")
        return {}


def selection(cells: list[Cell], device: str, with_peers: bool) -> Iterator[dict]:
    """The rows of cells on the same pre-activations."""
    first = cells[0]
    rows, n = first.rows, first.n
    size = rows * n * TORCH[first.dtype].itemsize
    pre = [draw_pre(rows, n, first.dtype, device, seed) for seed in range(copies_for(size, device))]
    read_ms = copy_ms(pre, device) / 2
    kernels = dispatch.sparse_part(first.backend)
    peers = selection_peers(pre, first, device) if with_peers else {}
    for cell in cells:
        k = draw_budgets(cell.k, rows, device)
        places = room(MOST if isinstance(k, Tensor) else k)
        mode = "hard" if cell.op == "hard_topk_code" else "soft"
        alpha = None if mode == "hard" else ALPHA
        forward = [partial(kernels.code_forward, x, k, alpha, None, 0.0, mode, places) for x in pre]
        entries = rows * (float(k.mean()) if isinstance(k, Tensor) else k)
        try:
            if cell.run == "forward":
                error = selection_error(forward[0](), pre[0], k, mode)
                ms = device_ms(forward, device)
                yield measured(cell, ms, read_ms, size, error, peers={**peers})
            else:
                yield backward_of_selection(cell, kernels, forward, int(entries), read_ms / size, device)
        except Exception as error:  # the row says so, and the rest is measured
            yield failed(cell, error)


def selection_error(code: tuple, pre: Tensor, k: Tensor | int, mode: str) -> float:
    """The largest error of the values of some rows, over the row's largest activation; of a hard selection
    the number of rows that differ."""
    pick = picked(pre)
    budgets = k[pick].double() if isinstance(k, Tensor) else k
    x = pre[pick]
    wide = x if mode == "hard" else x.double()
    alpha = None if mode == "hard" else ALPHA
    exact = reference_sparse.code_forward(wide, budgets, alpha, None, 0.0, mode, code[0].shape[1])
    got = scattered(code[0][pick], code[1][pick], pre.shape[1])
    want = scattered(exact[0], exact[1], pre.shape[1])
    if bool((code[3] > code[0].shape[1]).any()):
        raise RuntimeError(f"a row has {int(code[3].max())} entries, more than {code[0].shape[1]} places")
    if mode == "hard":
        return float((got != want).any(1).sum())
    return worst((got - want).abs() / x.double().amax(1, keepdim=True))


def picked(x: Tensor) -> list[int]:
    """Some rows, the first and the last among them."""
    return sorted({i * (len(x) - 1) // (ROWS_CHECKED - 1) for i in range(ROWS_CHECKED)})


def backward_of_selection(cell, kernels, forward, entries: int, ms_per_byte: float, device: str) -> dict:
    """Of code_backward, from the gradient of the values to those of the activations, k and alpha."""
    codes = [call() for call in forward]
    calls = []
    for i in range(copies_for(3 * codes[0][0].nbytes, device)):
        _, _, active, counts, state = codes[i % len(codes)]
        generator = torch.Generator(device).manual_seed(i)
        g = torch.randn(active.shape, device=device, generator=generator)
        calls.append(partial(kernels.code_backward, active.clone(), None, counts, state, ALPHA, g, 1.0))
    error = gradient_error(calls[0]()[0], *(calls[0].args[i] for i in (0, 2, 3, 5)))
    size = entries * 12  # active and g read, the gradient written
    return measured(cell, device_ms(calls, device), size * ms_per_byte, size, error)


def gradient_error(got: Tensor, active: Tensor, counts: Tensor, state: Tensor, g: Tensor) -> float:
    """Of some rows, over the largest of each."""
    pick = picked(active)
    arguments = (
        active[pick].double(),
        None,
        counts[pick],
        state[pick].double(),
        ALPHA,
        g[pick].double(),
        1.0,
    )
    want, *_ = reference_sparse.code_backward(*arguments)
    used = torch.arange(got.shape[1], device=got.device) < counts[pick].unsqueeze(1)
    scale = (want * used).abs().amax(1, keepdim=True).clamp(min=1e-30)
    return worst((got[pick].double() - want).abs() * used / scale)


def selection_peers(pre: list[Tensor], cell: Cell, device: str) -> dict[str, float]:
    """What selects otherwise: torch.topk of relu, and the dense operator with its product."""
    kernels = dispatch.module(cell.backend)
    budgets = draw_budgets("32..96", len(pre[0]), device)

    def dense(x: Tensor) -> Tensor:
        a = torch.relu(x)
        return a * kernels.soft_topk_forward(a, budgets, ALPHA, True)[0]

    return {
        **peer_ms(RELU_TOPK, [partial(lambda x: torch.relu(x).topk(64), x) for x in pre], device),
        **peer_ms(DENSE_TOPK, [partial(dense, x) for x in pre], device),
    }


def codes(cells: list[Cell], peers: list[Peer], device: str, per_byte_ms: float) -> Iterator[dict]:
    """The rows of cells on the same code: decoding and its backward. `per_byte_ms`: of a copy."""
    first = cells[0]
    rows, n, d, k = first.rows, first.n, first.d, int(first.k)
    dtype = TORCH[first.dtype]
    copies = copies_for((n + rows) * d * dtype.itemsize, device)
    generator = torch.Generator(device).manual_seed(7)
    latents = [draw_latents(rows, k, n, first.latents, device, seed) for seed in range(copies)]
    weights = [torch.randn(n, d, device=device, generator=generator).to(dtype) for _ in range(copies)]
    outer = [torch.randn(rows, d, device=device, generator=generator).to(dtype) for _ in range(copies)]
    kernels = dispatch.sparse_part(first.backend)
    fired = int((torch.zeros(n, device=device).index_fill_(0, latents[0].peer_indices.flatten(), 1)).sum())
    for cell in cells:
        measure = decoding if cell.run == "forward" else backward_of_decoding
        try:
            row = measure(cell, kernels, latents, weights, outer, device)
            size = compulsory_bytes(cell, fired, dtype.itemsize)
            row |= {"floor_ms": round(size * per_byte_ms, 5), "bytes": size}
            row["fraction"] = round(row["floor_ms"] / row["ms"], 4)
            row |= {"latents_fired": fired, "gathered_bytes": rows * k * d * dtype.itemsize}
            row["peers"] = times_of_peers(cell, peers, latents, weights, outer, device)
            yield row
        except Exception as error:
            yield failed(cell, error)


def compulsory_bytes(cell: Cell, fired: int, itemsize: int) -> int:
    """What has to be moved if every array went by once: the code, the rows of the weights that are used, the
    outputs; in the backward also the code's order and the gradients."""
    code = cell.rows * int(cell.k) * 8
    rows, weights = cell.rows * cell.d * itemsize, fired * cell.d * itemsize
    if cell.run == "forward":
        return code + weights + rows
    return code * 3 + rows + weights + cell.n * cell.d * itemsize


def decoding(cell, kernels, latents: list[Latents], weights, outer, device: str) -> dict:
    calls = [
        partial(kernels.decode, at.values, at.indices, at.counts, weight, None)
        for at, weight in zip(latents, weights, strict=True)
    ]
    first, again = calls[0](), calls[0]()
    error = decoding_error(first, latents[0], weights[0])
    return measured(cell, device_ms(calls, device), 0.0, 0, error, bit_equal=torch.equal(first, again))


def decoding_error(out: Tensor, at: Latents, weight: Tensor) -> float:
    """Of some rows, over the largest of each."""
    pick = picked(out)
    rows = weight[at.peer_indices[pick]].double()
    want = (at.peer_values[pick].double().unsqueeze(2) * rows).sum(1)
    return worst((out[pick].double() - want).abs() / want.abs().amax(1, keepdim=True))


def backward_of_decoding(cell, kernels, latents: list[Latents], weights, outer, device: str) -> dict:
    """The transposition with the gradients of weights and values, and each of the two by itself."""

    def gradients(at: Latents, weight: Tensor, g: Tensor, transposed: tuple):
        out = (at.values, at.indices, *transposed, g, weight, weight.dtype, False, False)
        return kernels.latent_gradients(*out)

    def transposition(at: Latents):
        return kernels.transpose(at.indices, at.counts, cell.n)

    def both(at: Latents, weight: Tensor, g: Tensor):
        return gradients(at, weight, g, transposition(at))

    data = list(zip(latents, weights, outer, strict=True))
    calls = [partial(both, *each) for each in data]
    first, again = calls[0](), calls[0]()
    equal = all(torch.equal(first[i], again[i]) for i in (0, 1))
    error = max(weight_error(first[0], *data[0]), value_error(first[1], *data[0]))
    orders = [partial(transposition, at) for at in latents]
    sums = [partial(gradients, *each, order()) for each, order in zip(data, orders, strict=True)]
    parts = {
        "transposition_ms": round(device_ms(orders, device), 5),
        "gradients_ms": round(device_ms(sums, device), 5),
    }
    return measured(cell, device_ms(calls, device), 0.0, 0, error, bit_equal=equal, **parts)


def weight_error(grad: Tensor, at: Latents, weight: Tensor, g: Tensor) -> float:
    """Of the rows of the most frequent latent, of two others that fire and of one that does not."""
    n = len(weight)
    frequency = torch.bincount(at.peer_indices.flatten(), minlength=n)
    fired = frequency.nonzero().flatten()
    pick = {int(frequency.argmax()), int(fired[0]), int(fired[-1]), int(frequency.argmin())}
    worst_error = 0.0
    for latent in pick:
        share = (at.peer_values.double() * (at.peer_indices == latent)).sum(1)
        want = share @ g.double()
        scale = want.abs().max().clamp(min=1e-30) if frequency[latent] else 1.0
        worst_error = max(worst_error, worst((grad[latent].double() - want).abs() / scale))
    return worst_error


def value_error(dots: Tensor, at: Latents, weight: Tensor, g: Tensor) -> float:
    pick = picked(g)
    want = (weight[at.peer_indices[pick]].double() * g[pick].double().unsqueeze(1)).sum(2)
    got = dots[pick].double()
    unused = got[:, want.shape[1] :].abs().max() if got.shape[1] > want.shape[1] else got.new_zeros(())
    difference = (got[:, : want.shape[1]] - want).abs() / want.abs().amax(1, keepdim=True)
    return max(worst(difference), worst(unused))


def times_of_peers(cell, peers: list[Peer], latents: list[Latents], weights, outer, device: str) -> dict:
    times: dict[str, float] = {}
    for peer in peers:
        data = [
            (at.peer_indices, at.peer_values.to(peer.values_dtype or weight.dtype), weight, g)
            for at, weight, g in zip(latents, weights, outer, strict=True)
        ]
        try:
            if cell.run == "forward":
                calls, recorded = [partial(peer.decode, *each[:3]) for each in data], True
                error = decoding_error(calls[0](), latents[0], weights[0])
            else:
                calls, recorded = [peer.backward(*each) for each in data], peer.recorded
                error = weight_error(calls[0]()[0], latents[0], weights[0], outer[0])
            if not error <= PEER_ERROR:
                print(f"  {peer.name}: its result is off by {error:.1e}")
                continue
        except Exception as error:
            print(f"  {peer.name}: {one_line(error)}")
            continue
        times |= peer_ms(peer.name, calls, device, recorded)
    return times
