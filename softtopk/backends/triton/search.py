"""Device functions: the rank-th largest element of a row by counting, never by sorting."""

import triton
import triton.language as tl

from softtopk.backends.triton.sweeps import split


@triton.jit
def ordered(x):
    """The integer with the order of x's values: -0 and +0 are one. Its own inverse on bits."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == 0, 0, key)


@triton.jit
def from_ordered(key, T: tl.constexpr):
    if T == tl.float64:
        x = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(T, bitcast=True)
    else:
        x = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(T, bitcast=True)
    return x


@triton.jit
def middle(low, high):
    """The value half way between, counted in representable values: low < middle <= high."""
    a = ordered(low)
    b = ordered(high)
    return from_ordered((a | b) - ((a ^ b) >> 1), low.dtype)


@triton.jit
def next_above(x):
    return from_ordered(ordered(x) + 1, x.dtype)


@triton.jit
def quantile(count, total):
    """About the normal quantile of a rank (Tukey's lambda): near linear in x for common rows."""
    share = 1.0 / (total.to(tl.float32) + 1)
    upper = (count.to(tl.float32) + 0.5) * share
    lower = ((total - count).to(tl.float32) + 0.5) * share
    return tl.exp2(0.14 * tl.log2(upper)) - tl.exp2(0.14 * tl.log2(lower))


@triton.jit
def count_search(
    tile, pointer, n, rank, plus, finite, total, low, high, tolerance,
    LARGEST: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rank-th largest element v, plus < rank <= plus + finite, and the number of elements above it.

    `low` <= v and an element `high` >= v close in on v by regula falsi on counts, with Anderson and
    Bjorck's weights and the representable middle when a bracket's elements do not halve in two
    steps. It stops when high - low <= tolerance; the result is then `high` and the number above.
    `total` is the number of finite elements of the row, of which these may be the largest only.
    """
    wanted = quantile(rank - plus, total)
    count_low = finite
    count_high = finite * 0
    # Distances of the two ends from the wanted rank; an end that stays has its own shrunk.
    excess = quantile(count_low, total) - wanted
    deficit = wanted - quantile(count_high, total)
    last_low = excess
    last_high = deficit
    moved = count_low * 0  # 1: low was the last to move, -1: high
    before = 4 * finite  # elements in the bracket, one step ago and two
    before_last = 4 * finite
    bisect = moved > 0
    while high - low > tolerance:
        c = high - (high - low) * (deficit / (excess + deficit)).to(tile.dtype)
        if bisect | (c <= low) | (c > high) | (c != c):
            c = middle(low, high)
        count, r_A, r_B = split(tile, pointer, n, c, LARGEST, RESIDENT, BLOCK)
        count -= plus
        distance = quantile(count, total) - wanted
        if count + plus >= rank:
            if moved == 1:
                deficit *= tl.maximum(1 - distance / last_low, 0.1)
            else:
                deficit = last_high
            low = r_A
            count_low = count
            excess = distance
            last_low = distance
            moved = moved * 0 + 1
        else:
            if moved == -1:
                excess *= tl.maximum(1 + distance / last_high, 0.1)
            else:
                excess = last_low
            high = r_B
            count_high = count
            deficit = -distance
            last_high = -distance
            moved = moved * 0 - 1
        bisect = ((count_low - count_high) * 2 > before_last) & (bisect == 0)
        before_last = before
        before = count_low - count_high
    return high, count_high + plus


@triton.jit
def narrow(tile, rank, low, high, count_low, tolerance):
    """(c, found): c has exactly `rank` elements of the tile at or above it, or is at most `tolerance` above
    the rank-th largest, or little is missing; found is false where more is.

    low <= v <= high for the rank-th largest element v. Three trials quarter the bracket in one sweep: the
    counts share a word, so the tile has fewer than 1024 elements.
    """
    count_high = rank * 0
    steps = rank * 0
    while (steps < 7) & (high - low > tolerance) & (count_low > rank):
        quarter = (high - low) * 0.25
        c_1 = low + quarter
        c_2 = low + quarter * 2
        c_3 = high - quarter
        counts = (tile >= c_1).to(tl.int32) + ((tile >= c_2).to(tl.int32) << 10)
        counts = tl.sum(counts + ((tile >= c_3).to(tl.int32) << 20))
        above_1 = counts & 1023
        above_2 = (counts >> 10) & 1023
        above_3 = counts >> 20
        if above_2 >= rank:
            upper = above_3 >= rank
            low = tl.where(upper, c_3, c_2)
            count_low = tl.where(upper, above_3, above_2)
            high = tl.where(upper, high, c_3)
            count_high = tl.where(upper, count_high, above_3)
        else:
            upper = above_1 >= rank
            low = tl.where(upper, c_1, low)
            count_low = tl.where(upper, above_1, count_low)
            high = tl.where(upper, c_2, c_1)
            count_high = tl.where(upper, above_2, above_1)
        steps += 1
    near = high - low <= tolerance
    return tl.where(near, high, low), near | (count_low - count_high <= 8)
