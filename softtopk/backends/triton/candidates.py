"""The elements of a row that its solution depends on one by one: the candidates.

Below any number that the threshold exceeds, the tail of the Laplace distribution is a pure
exponential, and the elements there count by one sum. So the row is seen as LANES lanes, see tiles.py.
At least half of each element not below c counts in S(c): where more than 2k lanes have their maxima
at or above c, S(c) > k and the threshold lies above c. A search over the maxima, which are few, finds
such a c with not many more elements above it than necessary. For a row too long to be swept at once
by a program's threads, one more sweep then sums the tail below c and writes the others, the
candidates, to memory, in an order that depends on nothing but their places in the row; for the
others see kept.py.
"""

import triton
import triton.language as tl

from softtopk.backends.triton.search import middle
from softtopk.backends.triton.sweeps import INF, add, extents
from softtopk.backends.triton.tiles import read_lanes


@triton.jit
def lower_bound(maxima, needed, GROUPS: tl.constexpr):
    """(c, top, found): at least `needed` of the maxima are >= c, a finite number, and not many more; top
    is the largest. Not found where there are fewer, or where a maximum is infinite or a NaN."""
    number = tl.zeros_like(maxima[0]).to(tl.int32)
    lowest = tl.full(maxima[0].shape, INF, maxima[0].dtype)
    highest = maxima[0]
    for g in tl.static_range(GROUPS):
        real = maxima[g] > -INF
        number += real.to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(real, maxima[g], INF))
        highest = tl.maximum(highest, maxima[g])
    above, low, top = extents(number, lowest, highest)
    found = (above >= needed) & (needed > 0) & (top < INF)
    enough = needed * 1.25 + 8
    high = top
    steps = above * 0
    searching = found & (above > enough)
    while searching:
        quarter = (high - low) * 0.25
        c_1 = low + quarter
        c_2 = low + quarter * 2
        c_3 = high - quarter
        if steps > 3:  # the range is wide beside where the maxima lie
            c_2 = middle(low, high)
            c_1 = middle(low, c_2)
            c_3 = middle(c_2, high)
        # The smallest maximum is below every trial, so no count exceeds 1023.
        searching = (c_1 > low) & (c_3 < high)
        if searching:
            counts = tl.zeros_like(maxima[0]).to(tl.int32)
            for g in tl.static_range(GROUPS):
                counts += (maxima[g] >= c_1).to(tl.int32) + ((maxima[g] >= c_2).to(tl.int32) << 10)
                counts += (maxima[g] >= c_3).to(tl.int32) << 20
            counts = tl.sum(counts)
            above_1 = counts & 1023
            above_2 = (counts >> 10) & 1023
            above_3 = counts >> 20
            reach_1 = above_1 >= needed
            reach_2 = above_2 >= needed
            reach_3 = above_3 >= needed
            high = tl.where(reach_3, high, tl.where(reach_2, c_3, tl.where(reach_1, c_2, c_1)))
            low = tl.where(reach_3, c_3, tl.where(reach_2, c_2, tl.where(reach_1, c_1, low)))
            above = tl.where(reach_3, above_3, tl.where(reach_2, above_2, tl.where(reach_1, above_1, above)))
            steps += 1
            searching = (above > enough) & (steps < 20)
    return low, top, found


@triton.jit
def find_candidates(
    pointer, n, scratch, k, scale, rate,
    LARGEST: tl.constexpr, FULL: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(m, floor, tail, top, found): the candidates are the m elements >= floor, now in scratch, and tail
    is the sum of exp((x - floor) / alpha) over the others, NaN where one of those is. top is the
    largest element.

    Not found where k is large beside LANES, or not positive, or where an element is +inf.
    """
    STEP: tl.constexpr = DEPTH * LANES
    maxima = tl.full([LANES], -INF, T)
    start = tl.zeros((), tl.int32)
    while start < n:
        x = read_lanes(pointer, start, n, LARGEST, FULL, DEPTH, LANES, T)
        maxima = tl.maximum(maxima, tl.max(x, 1))
        start += STEP
    needed = tl.floor(tl.where(k > 0, tl.minimum(k, LANES), 0) * 2).to(tl.int32) + 1
    needed = tl.where(k > 0, needed, 0)
    floor, top, found = lower_bound((maxima,), needed, 1)
    m = tl.zeros((), tl.int32)
    tail = tl.zeros((), T)
    if found:
        below = tl.zeros([LANES], T)
        lost = tl.zeros([LANES], T)
        start = tl.zeros((), tl.int32)
        while start < n:
            x = read_lanes(pointer, start, n, LARGEST, FULL, DEPTH, LANES, T)
            kept = x >= floor
            e = tl.where(kept, 0, tl.exp2(((x - floor) * scale) * rate))
            below, lost = add(below, lost, tl.sum(e, 1))
            number = tl.sum(kept.to(tl.int32), 1)
            before = tl.cumsum(number, 0) - number + (m - 1)
            place = tl.cumsum(kept.to(tl.int32), 1) + before[:, None]
            value = (x if LARGEST else -x).to(scratch.dtype.element_ty)
            tl.store(scratch + place, value, mask=kept)
            m += tl.sum(number)
            start += STEP
        tail = tl.sum(below)
        tl.debug_barrier()  # the candidates are read by other threads than wrote them
    return m, floor, tail, top, found
