"""From pre-activations to a sparse code in Triton, one program per row.

Bytes: pre is read from memory once, and twice again from registers or the cache where a row is short beside
it; nothing is written but the code. A first sweep finds the candidates on which the solution depends
(kept.py), then the row is swept for the entries, which go to their places by a cumulative sum, and last
the entries are read again for their values. Only where elements that are not entries have a share of
the gradient that counts is the row swept once more, for that.
The first place to look: backends/reference_sparse.py, the same in plain PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.reference import compute_dtype
from softtopk.backends.triton import launch
from softtopk.backends.triton.hard_topk import last_selected, select
from softtopk.backends.triton.kept import kept_candidates
from softtopk.backends.triton.solve import densities, solve
from softtopk.backends.triton.sweeps import (
    ACTIVATED,
    INF,
    LN_2,
    exponent,
    per_row,
    read,
    scale_in,
    sums,
    tails,
)
from softtopk.backends.triton.tiles import read_tiles

MODES = {"soft": 0, "straight_through": 1, "hard": 2}
SOFT = tl.constexpr(0)
STRAIGHT_THROUGH = tl.constexpr(1)
HARD = tl.constexpr(2)
SMALLEST = tl.constexpr(2.0**-24)  # of p and q


@triton.jit
def keeps(x, r_A, r_B, reach, scale, rate, v, ties, seen, MODE: tl.constexpr):
    """Which of a chunk's elements are entries, and the number of ties up to its end (see `select`). Above the
    threshold p >= 1/2; below it p or q is 2^-24 at a distance of `reach` alpha ln 2 from r_B."""
    kept = x < 0
    if MODE != HARD:
        kept = (x >= r_A) | ((r_B - x) * scale * rate <= reach)
    if MODE != SOFT:
        selected, seen = select(x, v, ties, seen)
        kept = kept | selected
    return kept & (x > 0), seen


@triton.jit
def outside_sums(
    source, n, last, positives, near, r_A, r_B, q_A, q_B, reach, scale, rate, v, ties,
    MODE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Q_out and M_out: the sums of q and of q (a - anchor) / alpha over the elements that are not stored,
    those that are no entries and those behind `last`. The zeros among them are all alike; of the others
    none has a share that counts where `near`, the largest, has none."""
    T: tl.constexpr = r_A.dtype
    NEGLIGIBLE: tl.constexpr = 128 if T == tl.float64 else 64
    anchor = tl.where(r_B == -INF, r_A, r_B)
    slope = rate * LN_2
    nothing = tl.zeros((), T)
    zeros = (n - positives).to(T)
    Q_out = zeros * tl.where(nothing >= r_A, q_A, q_B) * tails(nothing, r_A, r_B, scale, rate)
    M_out = tl.where(Q_out == 0, 0, Q_out * ((nothing - anchor) * scale * slope))
    if (near > 0) & ((r_B - near) * scale * rate < NEGLIGIBLE):
        part_q = tl.zeros([CHUNK], T)
        part_t = tl.zeros([CHUNK], T)
        seen = ties * 0
        start = tl.zeros((), tl.int32)
        while start < n:
            x = read(source, start, n, ACTIVATED, CHUNK, T)
            kept, seen = keeps(x, r_A, r_B, reach, scale, rate, v, ties, seen, MODE)
            stored = kept & (start + tl.arange(0, CHUNK) <= last)
            q = tl.where(x >= r_A, q_A, q_B) * tails(x, r_A, r_B, scale, rate)
            q = tl.where(stored | (x <= 0), 0, q)
            part_q += q
            part_t += q * tl.where(q == 0, 0, (x - anchor) * scale * slope)
            start += CHUNK
        more_q, more_t = sums(part_q, part_t)
        Q_out += more_q
        M_out += more_t
    return Q_out, M_out


@triton.jit(do_not_specialize=["n", "places", "k_bits", "alpha_bits", "threshold_bits"])
def code_kernel(
    x, x_stride, k, k_stride, k_bits: tl.int64, alpha, alpha_stride, alpha_bits: tl.int64,
    bias, thresholds, threshold_bits: tl.int64,
    values, indices, active, counts, state, n, places,
    MODE: tl.constexpr, T: tl.constexpr,
    FULL: tl.constexpr, KEEP: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    if ALIGNED:  # the compiler may know, and reads chunks 16 bytes at a time
        n = n // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    source = (x + row * x_stride, bias, thresholds, per_row(None, 0, threshold_bits, row).to(T))
    values += row * places
    indices += row * places
    active += row * places
    budget = per_row(k, k_stride, k_bits, row)
    a = scale_in(per_row(alpha, alpha_stride, alpha_bits, row), T)
    scale, rate = exponent(a, T)
    m = n
    floor = tl.zeros((), T)
    tail = tl.zeros((), T)
    top = tl.zeros((), T)
    found = n < 0
    if TILES > 0:
        tiles = read_tiles(source, n, ACTIVATED, FULL, TILES, DEPTH, LANES, T)
        tile, m, floor, tail, top, found = kept_candidates(
            tiles, source, n, budget, scale, rate, ACTIVATED, FULL, KEEP, TILES, DEPTH, LANES, GROUPS, SLOTS
        )
        m = tl.where(found, m, n)
    else:
        tile = read(source, 0, n, ACTIVATED, BLOCK, T)

    v = tl.zeros((), T)
    ties = tl.zeros((), tl.int32)
    r_A = tl.zeros((), T)
    r_B = r_A
    reach = r_A
    bad = found & (tail != tail)
    if MODE != SOFT:
        v, ties, _, nan = last_selected(tile, source, m, budget, n, ACTIVATED, False, BLOCK)
        bad = bad | nan
    if MODE != HARD:
        r_A, r_B, P, Q, D = solve(
            tile, source, m, n, floor, tail, top, found, budget, a.to(T), scale, rate, ACTIVATED, BLOCK
        )
        bad = D != D
        R, q_A, q_B = densities(r_A, r_B, P, Q, D, a)
        larger = tl.maximum(q_B, R * q_B) * (1 / SMALLEST)
        reach = tl.where(larger > 0, tl.log2(tl.maximum(larger, 2.0**-126)), -INF)

    number = tl.zeros((), tl.int32)
    seen = tl.zeros((), tl.int32)
    positives = tl.zeros([CHUNK], tl.int32)
    nearest = tl.full([CHUNK], -INF, T)
    start = tl.zeros((), tl.int32)
    while start < n:
        x_chunk = read(source, start, n, ACTIVATED, CHUNK, T)
        i = start + tl.arange(0, CHUNK)
        kept, seen = keeps(x_chunk, r_A, r_B, reach, scale, rate, v, ties, seen, MODE)
        kept = tl.where(bad, i == 0, kept)
        place = tl.cumsum(kept.to(tl.int32), 0) + (number - 1)
        stored = kept & (place < places)
        tl.store(indices + place, i, mask=stored)
        tl.store(active + place, tl.where(bad, float("nan"), x_chunk), mask=stored)
        number += tl.sum(kept.to(tl.int32))
        positives += (x_chunk > 0).to(tl.int32)
        nearest = tl.maximum(nearest, tl.where(stored, -INF, x_chunk))
        start += CHUNK
    tl.debug_barrier()  # the entries are read by other threads than wrote them
    tl.store(counts + row, number)

    h_A = r_A
    h_B = r_A
    if MODE != HARD:
        h_A = R * q_A
        h_B = R * q_B
        last = tl.load(indices + (places - 1), mask=number > places, other=n)
        Q_out, M_out = outside_sums(
            source, n, last, tl.sum(positives), tl.max(nearest),
            r_A, r_B, q_A, q_B, reach, scale, rate, v, ties, MODE, CHUNK,
        )  # fmt: skip
        nothing = tl.where(bad, float("nan"), 0).to(T)
        solved = state + row * 7
        tl.store(solved, r_A)
        tl.store(solved + 1, r_B)
        tl.store(solved + 2, P)
        tl.store(solved + 3, Q)
        tl.store(solved + 4, D)
        tl.store(solved + 5, Q_out + nothing)
        tl.store(solved + 6, M_out + nothing)

    ENTRIES: tl.constexpr = min(CHUNK, 128)
    seen = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    while start < places:
        place = start + tl.arange(0, ENTRIES)
        used = place < number
        within = place < places
        value = tl.load(active + place, mask=used & within, other=0)
        if MODE == STRAIGHT_THROUGH:  # the first ties of the row are the first ones of the entries
            selected, seen = select(value, v, ties, seen)
            value = tl.where(bad, value, tl.where(selected, value, 0))
        if MODE == SOFT:
            above = value >= r_A
            e = tails(value, r_A, r_B, scale, rate)
            p = tl.where(above, 1 - h_A * e, h_B * e)
            value = tl.where((p < SMALLEST) | (used == 0), 0, value * p)
        tl.store(values + place, value, mask=within)
        tl.store(indices + place, tl.zeros_like(place) + n, mask=within & (used == 0))
        tl.store(active + place, tl.zeros([ENTRIES], T), mask=within & (used == 0))
        start += ENTRIES


def code_forward(
    pre: Tensor,
    k: float | Tensor,
    alpha: float | Tensor | None,
    bias: Tensor | None,
    threshold: float | Tensor,
    mode: str,
    max_active: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """values, indices, active (rows, C), counts (rows,), state (rows, 7) or None for "hard"."""
    rows, n = pre.shape
    size, dtype = (rows, max_active), compute_dtype(pre.dtype)
    values, active = (pre.new_empty(size, dtype=dtype) for _ in range(2))
    indices = pre.new_empty(size, dtype=torch.int32)
    counts = pre.new_empty((rows,), dtype=torch.int32)
    state = None if mode == "hard" else pre.new_empty((rows, 7), dtype=dtype)
    if rows > 0:
        x = launch.rows_of(pre)
        bias = None if bias is None else bias.contiguous()
        thresholds = threshold.contiguous() if isinstance(threshold, Tensor) else None
        number = 0.0 if thresholds is not None else float(threshold)
        arguments = (
            x, x.stride(0), *launch.per_row(k), *launch.per_row(1.0 if alpha is None else alpha),
            bias, thresholds, launch.bits(number), values, indices, active, counts, state, n, max_active,
        )  # fmt: skip
        launch.run("code", code_kernel, x, arguments, MODE=MODES[mode])
    return values, indices, active, counts, state
