"""hard_topk in Triton, one program per row: a count search for the last selected value, then the mask
or the indices, with ties taken lowest index first.

Bytes: x is read once where a row fits into registers, and the mask or the indices are written;
a longer row is read again in every sweep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.triton import launch
from softtopk.backends.triton.search import count_search
from softtopk.backends.triton.sweeps import INF, chunk, per_row, read, statistics


@triton.jit
def last_selected(
    tile, pointer, n, k, cap,
    LARGEST: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(v, ties, count, bad): selected are the elements above v and the first `ties` equal to it.

    count = round-half-up(k) clamped to [#(+inf), n - #(-inf)], then to cap; 0 in a bad row.
    """
    nan, plus, finite, low, high = statistics(tile, pointer, n, LARGEST, RESIDENT, BLOCK)
    bad = nan | (k != k)
    count = tl.maximum(tl.floor(k + 0.5), plus.to(tl.float64))
    count = tl.minimum(tl.minimum(count, (plus + finite).to(tl.float64)), cap)
    count = tl.where(bad, 0, count).to(tl.int32)
    inner = count > plus  # else +inf is the last selected value, and there is nothing to search
    v, above = count_search(
        tile, pointer, n, tl.where(inner, count, plus + 1), plus, finite, finite,
        low, tl.where(inner, high, low), tl.zeros((), tile.dtype), LARGEST, RESIDENT, BLOCK,
    )  # fmt: skip
    return tl.where(inner, v, INF), count - tl.where(inner, above, 0), count, bad


@triton.jit
def select(x, v, ties, seen):
    """Which of a chunk's elements are selected, and the number of ties up to its end."""
    tie = x == v
    order = tl.cumsum(tie.to(tl.int32), 0) + seen
    return (x > v) | (tie & (order <= ties)), seen + tl.sum(tie.to(tl.int32))


@triton.jit(do_not_specialize=["k_bits"])
def mask_kernel(
    x, x_stride, k, k_stride, k_bits: tl.int64, mask, n,
    LARGEST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pointer = x + row * x_stride
    tile = read(pointer, 0, n, LARGEST, BLOCK, T)
    budget = per_row(k, k_stride, k_bits, row)
    v, ties, _, bad = last_selected(tile, pointer, n, budget, n, LARGEST, RESIDENT, BLOCK)
    seen = ties * 0
    start = tl.zeros((), tl.int32)
    while start < (BLOCK if RESIDENT else n):
        values = chunk(tile, pointer, start, n, LARGEST, RESIDENT, BLOCK)
        selected, seen = select(values, v, ties, seen)
        out = tl.where(bad, float("nan"), tl.where(selected, 1.0, 0.0))
        i = start + tl.arange(0, BLOCK)
        tl.store(mask + row * n + i, out.to(mask.dtype.element_ty), mask=i < n)
        start += BLOCK


def hard_topk_mask(x: Tensor, k: float | Tensor, largest: bool = True) -> Tensor:
    """1 for the round-half-up(k) largest elements of each row, lowest index first among equals; else 0."""
    rows, n = x.shape
    mask = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if rows == 0:
        return mask
    x = launch.rows_of(x)
    arguments = (x, x.stride(0), *launch.per_row(k), mask, n)
    launch.run("hard_topk", mask_kernel, x, arguments, LARGEST=largest)
    return mask


@triton.jit(do_not_specialize=["k_bits"])
def indices_kernel(
    x, x_stride, k, k_stride, k_bits: tl.int64, indices, counts, max_k, n,
    LARGEST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pointer = x + row * x_stride
    out = indices + row * max_k
    tile = read(pointer, 0, n, LARGEST, BLOCK, T)
    budget = per_row(k, k_stride, k_bits, row)
    v, ties, count, _ = last_selected(tile, pointer, n, budget, max_k, LARGEST, RESIDENT, BLOCK)
    seen = ties * 0
    written = ties * 0
    start = tl.zeros((), tl.int32)
    while start < (BLOCK if RESIDENT else n):
        values = chunk(tile, pointer, start, n, LARGEST, RESIDENT, BLOCK)
        selected, seen = select(values, v, ties, seen)
        place = written + tl.cumsum(selected.to(tl.int32), 0) - 1
        i = start + tl.arange(0, BLOCK)
        tl.store(out + place, i.to(tl.int64), mask=selected)
        written += tl.sum(selected.to(tl.int32))
        start += BLOCK
    start = tl.zeros((), tl.int32)
    while start < max_k:
        place = start + tl.arange(0, BLOCK)
        unused = tl.full([BLOCK], -1, tl.int64)
        tl.store(out + place, unused, mask=(place >= count) & (place < max_k))
        start += BLOCK
    tl.store(counts + row, count.to(tl.int64))


def hard_topk_indices(
    x: Tensor, k: float | Tensor, max_k: int, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """The same elements, at most max_k of a row, the largest.

    Indices (rows, max_k) int64, ascending, then -1; counts (rows,) int64.
    """
    rows, n = x.shape
    indices = torch.empty((rows, max_k), dtype=torch.int64, device=x.device)
    counts = torch.empty((rows,), dtype=torch.int64, device=x.device)
    if rows == 0:
        return indices, counts
    x = launch.rows_of(x)
    arguments = (x, x.stride(0), *launch.per_row(k), indices, counts, max_k, n)
    launch.run("hard_topk", indices_kernel, x, arguments, LARGEST=largest)
    return indices, counts
