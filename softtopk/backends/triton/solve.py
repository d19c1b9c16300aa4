"""Device functions: the solution of the soft top-k, and the densities that follow from it.

Notation and derivation: backends/reference.py; sweeps and exponents: sweeps.py.
"""

import triton
import triton.language as tl

from softtopk.backends.triton.search import count_search, middle, narrow, next_above
from softtopk.backends.triton.sweeps import INF, LN_2, LOG2_E, split, statistics, tail_sums


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
    tile, pointer, m, n, floor, tail, top, found, k, alpha, scale, rate,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """r_A, r_B, P, Q, D of a row of n elements; k in float64, alpha in the compute dtype.

    The m elements at `pointer` are the row or, where `found`, its candidates: see candidates.py. The tile
    holds the first BLOCK of them, or all candidates of a row whose m is then no more than BLOCK.

    A trial c splits the row; its r_A belongs in B where S(r_A) > k, its r_B in A where S(r_B) < k,
    and the row is solved when neither does. Elements known to lie in B reach up to `low`, those in
    A down to `high`; every trial lies between, so each one that fails settles an element.
    """
    T: tl.constexpr = top.dtype
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
