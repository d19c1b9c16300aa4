"""The elements of a row that its solution depends on one by one: the candidates.

Below any number that the threshold exceeds, the tail of the Laplace distribution is a pure
exponential, and the elements there count by one sum. So the row is seen as LANES lanes, element i in
lane i mod LANES. At least half of each element not below c counts in S(c): where more than 2k lanes
have their maxima at or above c, S(c) > k and the threshold lies above c. A bisection over the maxima,
which are few, finds such a c with not many more elements above it than necessary. One sweep then sums
the tail below c and writes the others, the candidates, to memory, in an order that depends on nothing
but their places in the row. A tile is DEPTH x LANES, and a thread holds whole columns of it, so that
a reduction of a lane takes no exchange between threads.
"""

import triton
import triton.language as tl

from softtopk.backends.triton.solve import INF, add, extents, middle


@triton.jit
def read_lanes(
    pointer, start, n, LARGEST: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr
):
    """Elements start ... start + DEPTH * LANES - 1 in the compute dtype, negated for the smallest."""
    i = start + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    x = tl.load(pointer + i, mask=i < n, other=-INF if LARGEST else INF).to(T)
    return x if LARGEST else -x


@triton.jit
def lanes(
    tile, pointer, start, n,
    LARGEST: tl.constexpr, RESIDENT: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    if RESIDENT:
        x = tile
    else:
        x = read_lanes(pointer, start, n, LARGEST, DEPTH, LANES, tile.dtype)
    return x


@triton.jit
def store_lanes(pointer, start, n, value, DEPTH: tl.constexpr, LANES: tl.constexpr):
    i = start + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tl.store(pointer + i, value.to(pointer.dtype.element_ty), mask=i < n)


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
    tile, pointer, n, scratch, k, scale, rate,
    LARGEST: tl.constexpr, RESIDENT: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(m, floor, tail, top, found): the candidates are the m elements >= floor, now in scratch, and tail
    is the sum of exp((x - floor) / alpha) over the others, NaN where one of those is. top is the
    largest element.

    Not found where k is large beside LANES, or not positive, or where an element is +inf.
    """
    T: tl.constexpr = tile.dtype
    STEP: tl.constexpr = DEPTH * LANES
    maxima = tl.full([LANES], -INF, T)
    start = tl.zeros((), tl.int32)
    while start < (STEP if RESIDENT else n):
        x = lanes(tile, pointer, start, n, LARGEST, RESIDENT, DEPTH, LANES)
        maxima = tl.maximum(maxima, tl.max(x, 0))
        start += STEP
    needed = tl.floor(tl.where(k > 0, tl.minimum(k, LANES), 0) * 2).to(tl.int32) + 1
    needed = tl.where(k > 0, needed, 0)
    floor, top, found = lower_bound(maxima, needed)
    m = tl.zeros((), tl.int32)
    tail = tl.zeros((), T)
    if found:
        below = tl.zeros([LANES], T)
        lost = tl.zeros([LANES], T)
        start = tl.zeros((), tl.int32)
        while start < (STEP if RESIDENT else n):
            x = lanes(tile, pointer, start, n, LARGEST, RESIDENT, DEPTH, LANES)
            kept = x >= floor
            e = tl.where(kept, 0, tl.exp2(((x - floor) * scale) * rate))
            below, lost = add(below, lost, tl.sum(e, 0))
            order = tl.cumsum(kept.to(tl.int32), 0)
            number = tl.sum(kept.to(tl.int32), 0)
            place = order + (tl.cumsum(number, 0) - number + (m - 1))[None, :]
            tl.store(scratch + place, (x if LARGEST else -x).to(scratch.dtype.element_ty), mask=kept)
            m += tl.sum(number)
            start += STEP
        tail = tl.sum(below)
        tl.debug_barrier()  # the candidates are read by other threads than wrote them
    return m, floor, tail, top, found
