"""The elements of a row that its solution depends on one by one: the candidates.

Below any number that the threshold exceeds, the tail of the Laplace distribution is a pure
exponential, and the elements there count by one sum. So the row is seen as LANES lanes, element i in
lane i mod LANES. At least half of each element not below c counts in S(c): where more than 2k lanes
have their maxima at or above c, S(c) > k and the threshold lies above c. A bisection over the maxima,
which are few, finds such a c with not many more elements above it than necessary. One sweep then sums
the tail below c and writes the others, the candidates, to memory, in an order that depends on nothing
but their places in the row.

A tile is LANES x DEPTH, and a thread holds whole columns of it, so that a reduction of a lane takes
no exchange between threads. TILES is the number of tiles of a row that is kept in registers, and 0
for one that is read again in every sweep. Tiles are small because a compiler that is given all of a
row at once keeps several intermediate results of all of it.
"""

import triton
import triton.language as tl

from softtopk.backends.triton.search import middle
from softtopk.backends.triton.sweeps import INF, add, extents


@triton.jit
def places(pointer, start, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """Those of a tile's elements in the row, and the pointers there. These are said not to be contiguous:
    the places of candidates are not, and another layout would move tiles through shared memory."""
    i = start + (tl.arange(0, LANES)[:, None] + tl.arange(0, DEPTH)[None, :] * LANES)
    return i, tl.max_contiguous(pointer + i, [1, 1])


@triton.jit
def read_lanes(
    pointer, start, n,
    LARGEST: tl.constexpr, FULL: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Elements start ... start + DEPTH * LANES - 1 in the compute dtype, negated for the smallest."""
    i, here = places(pointer, start, DEPTH, LANES)
    if FULL:
        x = tl.load(here)
    else:
        x = tl.load(here, mask=i < n, other=-INF if LARGEST else INF)
    x = x.to(T)
    return x if LARGEST else -x


@triton.jit
def store_lanes(pointer, start, n, value, FULL: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr):
    i, here = places(pointer, start, DEPTH, LANES)
    value = value.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(here, value)
    else:
        tl.store(here, value, mask=i < n)


@triton.jit
def read_tiles(
    pointer, n,
    LARGEST: tl.constexpr, FULL: tl.constexpr,
    TILES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The row as a tuple of tiles in registers; one that nothing uses is not read."""
    tiles = (read_lanes(pointer, 0, n, LARGEST, FULL, DEPTH, LANES, T),)
    for i in tl.static_range(1, TILES):
        tiles += (read_lanes(pointer, i * DEPTH * LANES, n, LARGEST, FULL, DEPTH, LANES, T),)
    return tiles


@triton.jit
def lanes(
    tiles, i: tl.constexpr, pointer, start, n,
    LARGEST: tl.constexpr, FULL: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    if TILES > 0:
        x = tiles[i]
    else:
        x = read_lanes(pointer, start, n, LARGEST, FULL, DEPTH, LANES, tiles[0].dtype)
    return x


@triton.jit
def lower_bound(maxima, needed):
    """(c, top, found): at least `needed` of the maxima are >= c, a finite number, and not many more; top
    is the largest. Not found where there are fewer, or where a maximum is infinite or a NaN."""
    real = maxima > -INF
    above, low, top = extents(real.to(tl.int32), tl.where(real, maxima, INF), maxima)
    found = (above >= needed) & (needed > 0) & (top < INF)
    enough = needed * 1.25 + 8
    high = top
    steps = above * 0
    c = low * 0.5 + high * 0.5
    while found & (above > enough) & (c > low) & (c < high):
        count = tl.sum((maxima >= c).to(tl.int32))
        if count >= needed:
            low = c
            above = count
        else:
            high = c
        steps += 1
        c = low * 0.5 + high * 0.5
        if steps > 8:  # the range is wide beside where the maxima lie
            c = middle(low, high)
    return low, top, found


@triton.jit
def find_candidates(
    tiles, pointer, n, scratch, k, scale, rate,
    LARGEST: tl.constexpr, FULL: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(m, floor, tail, top, found): the candidates are the m elements >= floor, now in scratch, and tail
    is the sum of exp((x - floor) / alpha) over the others, NaN where one of those is. top is the
    largest element.

    Not found where k is large beside LANES, or not positive, or where an element is +inf.
    """
    T: tl.constexpr = tiles[0].dtype
    STEP: tl.constexpr = DEPTH * LANES
    maxima = tl.full([LANES], -INF, T)
    start = tl.zeros((), tl.int32)
    while start < (TILES * STEP if TILES > 0 else n):
        for i in tl.static_range(max(TILES, 1)):
            x = lanes(tiles, i, pointer, start, n, LARGEST, FULL, TILES, DEPTH, LANES)
            maxima = tl.maximum(maxima, tl.max(x, 1))
            start += STEP
    needed = tl.floor(tl.where(k > 0, tl.minimum(k, LANES), 0) * 2).to(tl.int32) + 1
    needed = tl.where(k > 0, needed, 0)
    floor, top, found = lower_bound(maxima, needed)
    m = tl.zeros((), tl.int32)
    tail = tl.zeros((), T)
    if found:
        # Or the compiler keeps a half precision row twice, converted and not.
        one = tl.where(n > 0, 1, 0).to(T)
        below = tl.zeros([LANES], T)
        lost = tl.zeros([LANES], T)
        is_first = tl.arange(0, DEPTH)[None, :] == 0
        start = tl.zeros((), tl.int32)
        while start < (TILES * STEP if TILES > 0 else n):
            number = tl.zeros([LANES], tl.int32)
            for i in tl.static_range(max(TILES, 1)):
                x = lanes(tiles, i, pointer, start, n, LARGEST, FULL, TILES, DEPTH, LANES)
                kept = x >= floor
                e = tl.where(kept, 0, tl.exp2(((x - floor) * scale) * rate))
                if TILES > 0:
                    below += tl.sum(e, 1)
                else:
                    below, lost = add(below, lost, tl.sum(e, 1))
                number += tl.sum(kept.to(tl.int32), 1)
            before = tl.cumsum(number, 0) - number + (m - 1)
            for i in tl.static_range(max(TILES, 1)):
                x = lanes(tiles, i, pointer, start, n, LARGEST, FULL, TILES, DEPTH, LANES)
                kept = x >= floor
                # What is before enters the scan, which so keeps nothing across the exchange above.
                place = tl.cumsum(kept.to(tl.int32) + tl.where(is_first, before[:, None], 0), 1)
                value = (x * one if LARGEST else -x).to(scratch.dtype.element_ty)
                tl.store(scratch + place, value, mask=kept)
                before += tl.sum(kept.to(tl.int32), 1)
                start += STEP
            m += tl.sum(number)
        tail = tl.sum(below)
        tl.debug_barrier()  # the candidates are read by other threads than wrote them
    return m, floor, tail, top, found
