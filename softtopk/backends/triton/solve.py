"""Device functions: sweeps over a row, the count search, and the solution of the soft top-k.

Notation and derivation: backends/reference.py. A sweep reduces the row: its first BLOCK elements
are a tile in registers, and where that is not all (RESIDENT) the others are read again in chunks. It keeps one partial
result per place of a chunk and reduces those once, at its end: a reduction costs a barrier. The
order of a sum does not depend on the row's place in the batch. Elements beyond n read as -inf, the value
that the operator leaves out. Exponents are in base 2, and a difference is taken before it is
scaled: exp(-d / alpha) = exp2(-d * scale * rate), with the power of two `scale` there so that
neither 1 / alpha nor alpha can overflow or underflow.
"""

import os

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
# A reduction of several tensors at once; the interpreter would go through it element by element.
FUSED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def per_row(pointer, stride, bits, row):
    """One row's k or alpha in float64: from a tensor, or the number whose bits are given."""
    if pointer is None:
        value = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        value = tl.load(pointer + row * stride).to(tl.float64)
    return value


@triton.jit
def scale_in(alpha, T: tl.constexpr):
    """alpha, in float64, but a positive finite one within what T can hold."""
    if T == tl.float32:
        within = tl.minimum(tl.maximum(alpha, 2.0**-149), (2 - 2.0**-23) * 2.0**127)
        alpha = tl.where((alpha > 0) & (alpha < INF), within, alpha)
    return alpha


@triton.jit
def read(pointer, start, n, LARGEST: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """Elements start ... start + BLOCK - 1 in the compute dtype, negated for the smallest."""
    i = start + tl.arange(0, BLOCK)
    x = tl.load(pointer + i, mask=i < n, other=0).to(T)
    if not LARGEST:
        x = -x
    return tl.where(i < n, x, -INF)


@triton.jit
def chunk(tile, pointer, start, n, LARGEST: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr):
    if RESIDENT:
        x = tile
    else:
        x = read(pointer, start, n, LARGEST, BLOCK, tile.dtype)
    return x


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def sums(a, b):
    """The sums of two tensors, with one barrier."""
    if FUSED:
        a, b = tl.reduce((a, b), 0, add_both)
    else:
        a = tl.sum(a)
        b = tl.sum(b)
    return a, b


@triton.jit
def join_extents(count, low, high, more, lower, higher):
    return count + more, tl.minimum(low, lower), tl.maximum(high, higher)


@triton.jit
def extents(count, low, high):
    """The sum of the first, the minimum of the second and the maximum of the third, with one barrier."""
    if FUSED:
        count, low, high = tl.reduce((count, low, high), 0, join_extents)
    else:
        count = tl.sum(count)
        low = tl.min(low)
        high = tl.max(high)
    return count, low, high


@triton.jit
def statistics_of(x):
    inside = tl.abs(x) < INF
    low = tl.where(inside, x, INF)
    high = tl.where(inside, x, -INF)
    return (x != x).to(tl.int32), (x == INF).to(tl.int32), inside.to(tl.int32), low, high


@triton.jit
def statistics(tile, pointer, n, LARGEST: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr):
    """Whether there is a NaN, the numbers of +inf and of finite elements, and the finite min and max."""
    nan, plus, finite, low, high = statistics_of(tile)
    if not RESIDENT:
        start = tl.zeros((), tl.int32) + BLOCK
        while start < n:
            x = read(pointer, start, n, LARGEST, BLOCK, tile.dtype)
            nans, pluses, more, lower, higher = statistics_of(x)
            nan += nans
            plus += pluses
            finite, low, high = join_extents(finite, low, high, more, lower, higher)
            start += BLOCK
    nans, plus = sums(nan, plus)
    finite, low, high = extents(finite, low, high)
    return nans > 0, plus, finite, low, high


@triton.jit
def split_of(x, c):
    above = x >= c
    return above.to(tl.int32), tl.where(above, x, INF), tl.where(above, -INF, x)


@triton.jit
def split(tile, pointer, n, c, LARGEST: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr):
    """A = {x >= c}: |A|, r_A = min A and r_B = max of the rest; +inf and -inf where there is none."""
    count, r_A, r_B = split_of(tile, c)
    if not RESIDENT:
        start = tl.zeros((), tl.int32) + BLOCK
        while start < n:
            more, lower, higher = split_of(read(pointer, start, n, LARGEST, BLOCK, tile.dtype), c)
            count, r_A, r_B = join_extents(count, r_A, r_B, more, lower, higher)
            start += BLOCK
    return extents(count, r_A, r_B)


@triton.jit
def tails(x, r_A, r_B, scale, rate):
    """exp(-|x - r| / alpha) with each element's own reference; 0 for an infinite element.

    On the side of an infinite reference lie infinite elements only, and their distance from any
    finite number is infinite.
    """
    origin_A = tl.where(tl.abs(r_A) < INF, r_A, 0)
    origin_B = tl.where(tl.abs(r_B) < INF, r_B, 0)
    distance = tl.abs(x - tl.where(x >= r_A, origin_A, origin_B))
    return tl.exp2(-(distance * scale) * rate)


@triton.jit
def add(total, lost, term):
    """total + term, and what its rounding added (Kahan): equal terms would all round the same way."""
    term -= lost
    after = total + term
    return after, (after - total) - term


@triton.jit
def tails_of(x, r_A, r_B, scale, rate):
    e = tails(x, r_A, r_B, scale, rate)
    return tl.where(x >= r_A, e, 0), tl.where(x >= r_A, 0, e)


@triton.jit
def tail_sums(
    tile, pointer, n, r_A, r_B, scale, rate,
    LARGEST: tl.constexpr, RESIDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P and Q."""
    P, Q = tails_of(tile, r_A, r_B, scale, rate)
    if not RESIDENT:
        lost_P = tl.zeros([BLOCK], tile.dtype)
        lost_Q = tl.zeros([BLOCK], tile.dtype)
        start = tl.zeros((), tl.int32) + BLOCK
        while start < n:
            x = read(pointer, start, n, LARGEST, BLOCK, tile.dtype)
            above, below = tails_of(x, r_A, r_B, scale, rate)
            P, lost_P = add(P, lost_P, above)
            Q, lost_Q = add(Q, lost_Q, below)
            start += BLOCK
    return sums(P, Q)


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


@triton.jit
def exponent(alpha, T: tl.constexpr):
    """(scale, rate) in T: exp(-d / alpha) = exp2(-d * scale * rate) for every alpha > 0 that T holds.

    alpha is float64 and the rate is rounded once: an exponent of 60 multiplies every rounding by 60.
    """
    big = 2.0**512 if T == tl.float64 else 2.0**64
    scale = tl.where(alpha < 1 / big, big, tl.where(alpha > big, 1 / big, 1.0)).to(tl.float64)
    return scale.to(T), (1.0 / (alpha * scale) * LOG2_E).to(T)


@triton.jit
def masses(P, Q, D, half_gap):
    """R, and the shares w_A = H_A / R, w_B = H_B / R; half_gap is exp(-(r_A - r_B) / (2 alpha)).

    Everything is divided by the larger of |D| and the coupling, so that the shares hold where R
    underflows; where both are 0 they are the limit.
    """
    coupling = tl.where((P == 0) | (Q == 0), 0, tl.sqrt(P) * tl.sqrt(Q) * half_gap)
    magnitude = tl.maximum(tl.abs(D), coupling)
    one_sided = ((P == 0) | (Q == 0)).to(D.dtype)
    d = tl.where(magnitude == 0, one_sided, tl.abs(D) / magnitude)
    c = tl.where(magnitude == 0, 1 - one_sided, coupling / magnitude)
    r = tl.sqrt(d * d + c * c)
    larger = (r + d) / (2 * r)
    smaller = c * c / (2 * r * (r + d))  # the conjugate: no cancellation
    above = (D > 0) | ((D == 0) & (P > 0))
    return magnitude * r, tl.where(above, larger, smaller), tl.where(above, smaller, larger)


@triton.jit
def densities(r_A, r_B, P, Q, D, alpha):
    """R, q_A, q_B: q = q_A e above and q_B e below, and h = R q; alpha in float64."""
    # The exponent in float64, its whole part apart: h and its gradients keep their last places
    # however wide the gap is.
    t = (r_A.to(tl.float64) - r_B.to(tl.float64)) * (-0.5 * LOG2_E) / alpha
    t = tl.maximum(t, -2000.0)
    whole = tl.floor(t)
    half_gap = tl.exp2((t - whole).to(D.dtype)) * tl.exp2(whole.to(D.dtype))
    R, w_A, w_B = masses(P, Q, D, half_gap)
    return R, tl.where(P == 0, 0, w_A / P), tl.where(Q == 0, 0, w_B / Q)


@triton.jit
def solve(
    pointer, m, n, floor, tail, top, found, k, alpha, scale, rate,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """r_A, r_B, P, Q, D of a row of n elements; k in float64, alpha in the compute dtype.

    The m elements at `pointer` are the row or, where `found`, its candidates: see candidates.py.

    A trial c splits the row; its r_A belongs in B where S(r_A) > k, its r_B in A where S(r_B) < k,
    and the row is solved when neither does. Elements known to lie in B reach up to `low`, those in
    A down to `high`; every trial lies between, so each one that fails settles an element.
    """
    T: tl.constexpr = top.dtype
    tile = read(pointer, 0, m, LARGEST, BLOCK, T)
    nan = tail != tail  # a NaN is no candidate, so it is in the tail
    plus = tl.zeros((), tl.int32)
    finite = plus + m
    lowest = floor
    highest = top
    if not found:
        nan, plus, finite, lowest, highest = statistics(tile, pointer, m, LARGEST, False, BLOCK)
    clamped = tl.minimum(tl.maximum(k, plus.to(tl.float64)), (plus + finite).to(tl.float64))
    whole = tl.floor(clamped + 0.5)
    part = (clamped - whole).to(T)  # |A| - k is then right to the last place of T
    whole = whole.to(tl.int32)
    bad = nan | (k != k) | (alpha != alpha) | (alpha <= 0) | (alpha == INF)
    empty = clamped <= plus.to(tl.float64)  # k' = 0: no element in A, whatever the rounding
    full = clamped >= (plus + finite).to(tl.float64)
    settled = bad | empty | full

    rank = tl.minimum(tl.maximum(whole, plus + 1), plus + finite)
    total = tl.where(found, n, finite)
    tolerance = tl.where(settled, INF, alpha)
    c = highest
    searching = settled == 0
    if searching & found & (m <= BLOCK):
        c, near = narrow(tile, rank, floor, highest, m, tolerance)
        searching = near == 0
    if searching:
        c, _ = count_search(
            tile, pointer, m, rank, plus, finite, total, lowest, highest, tolerance, LARGEST, False, BLOCK
        )

    low = tl.where(found, floor, -INF).to(T)
    high = tl.full((), INF, T)
    c = tl.where(empty, INF, tl.where(full, lowest, c)).to(T)
    if c <= low:
        c = next_above(low)
    count_low = plus + finite
    count_high = plus
    before = 4 * finite
    before_last = 4 * finite
    bisect = finite < 0
    noise = 2e-15 if T == tl.float64 else 5e-7
    r_A = high
    r_B = low
    P = tl.zeros((), T)
    Q = tl.zeros((), T)
    D = tl.zeros((), T)
    searching = finite >= 0
    while searching:
        count, r_A, r_B = split(tile, pointer, m, c, LARGEST, False, BLOCK)
        P, Q = tail_sums(tile, pointer, m, r_A, r_B, scale, rate, LARGEST, False, BLOCK)
        # Below c there may be no candidate, and then r_B is not known; but the lowest one is in B.
        within = found & (r_B > -INF)
        Q += tl.where(within, tail * tl.exp2(-((r_B - floor) * scale) * rate), 0)
        D = (count - whole).to(T) - part
        half_gap = tl.exp2(-((r_A - r_B) * scale) * rate * 0.5)
        gap = tl.where((P == 0) | (Q == 0), 0, half_gap * half_gap)
        # S - k at r_A and at r_B; within `noise` of its slope it makes no difference to p or q.
        excess = D - 0.5 * P + 0.5 * Q * gap
        deficit = D - 0.5 * P * gap + 0.5 * Q
        up = (r_A < high) & ((excess > noise * (P + Q * gap)) | (found & (r_B == -INF)))
        down = (r_B > low) & (deficit < -noise * (P * gap + Q)) & (up == 0)
        searching = (up | down) & (settled == 0)
        if searching:
            R, w_A, w_B = masses(P, Q, D, half_gap)
            if up:  # the root that this split would have is a bound from the same side
                low = r_A
                count_low = count
                c = r_A + alpha * LN_2 * tl.log2(2 * R * w_A / P)
            else:
                high = r_B
                count_high = count
                c = r_B - alpha * LN_2 * tl.log2(2 * R * w_B / Q)
            if bisect:
                c = middle(tl.maximum(low, lowest), tl.minimum(high, highest))
            c = tl.minimum(c, high)
            if (c <= low) | (c != c):
                c = next_above(low)
            bisect = ((count_low - count_high) * 2 > before_last) & (bisect == 0)
            before_last = before
            before = count_low - count_high

    free = (clamped == k) & (bad == 0)
    nothing = tl.where(bad, float("nan"), 0).to(T)
    return (
        r_A + nothing, r_B + nothing, tl.where(free, P, nothing), tl.where(free, Q, nothing),
        tl.where(bad, nothing, D),
    )  # fmt: skip
