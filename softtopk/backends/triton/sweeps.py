"""Device functions: arguments of a row, and sweeps over it.

Notation and derivation: backends/reference.py. A sweep reduces the row: its first BLOCK elements are a
tile in registers, and where that is not all (RESIDENT) the others are read again in chunks. It keeps
one partial result per place of a chunk and reduces those once, at its end: a reduction costs a
barrier. The order of a sum does not depend on the row's place in the batch. Elements beyond n read as
-inf, the value that the operator leaves out. Exponents are in base 2, and a difference is taken
before it is scaled: exp(-d / alpha) = exp2(-d * scale * rate), with the power of two `scale` there so
that neither 1 / alpha nor alpha can overflow or underflow.

Where LARGEST is ACTIVATED the elements are activations, which are not in memory, and `pointer` is what
they are made of, see `activated`.
"""

import os

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
# A reduction of several tensors at once; the interpreter would go through it element by element.
FUSED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ACTIVATED = tl.constexpr("activated")


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
def exponent(alpha, T: tl.constexpr):
    """(scale, rate) in T: exp(-d / alpha) = exp2(-d * scale * rate) for every alpha > 0 that T holds.

    alpha is float64 and the rate is rounded once: an exponent of 60 multiplies every rounding by 60.
    """
    big = 2.0**512 if T == tl.float64 else 2.0**64
    scale = tl.where(alpha < 1 / big, big, tl.where(alpha > big, 1 / big, 1.0)).to(tl.float64)
    return scale.to(T), (1.0 / (alpha * scale) * LOG2_E).to(T)


@triton.jit
def plain(scale, origin):
    """Whether `distance` holds for references whose product with the rate is `origin`: 2^rest is finite."""
    return (scale == 1) & (tl.abs(origin) < 2.0**28)


@triton.jit
def distance(x, r, rate, origin):
    """(x - r) * rate and a rest, that of x = r, in one instruction; `origin` is about r * rate.

    Of x * rate - origin nothing is lost, because it is rounded once: each element is as exact as by
    the difference, but for the same factor 2^rest.
    """
    if x.dtype == tl.float64:
        t = (x - tl.where(tl.abs(r) < INF, r, 0)) * rate
    elif FUSED:
        t = tl.fma(x, rate, -origin)
    else:  # the interpreter has no such instruction
        t = (x.to(tl.float64) * rate.to(tl.float64) - origin.to(tl.float64)).to(tl.float32)
    return t


@triton.jit
def origin_below(r, rate):
    """(origin, rest) of a reference, with rest >= 0; of an infinite one, 0."""
    r = tl.where(tl.abs(r) < INF, r, 0)
    origin = r * rate
    if distance(r, r, rate, origin) < 0:
        origin -= tl.abs(origin) * 2.0**-23
    return origin, distance(r, r, rate, origin)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """x in another type, rounded to nearest even: the interpreter cuts the bits that bfloat16 lacks off."""
    y = x.to(TYPE)
    if TYPE == tl.bfloat16 and not FUSED:
        word = x.to(tl.float32).to(tl.int32, bitcast=True)
        word += ((word >> 16) & 1) + 0x7FFF
        y = tl.where(x == x, (word >> 16).to(tl.int16).to(TYPE, bitcast=True), y)
    return y


@triton.jit
def activated(source, start, places, inside, T: tl.constexpr):
    """The activations of a row at start + places, -inf where not inside: z = x + bias, rounded to x's dtype,
    where it is above the threshold or a NaN, else 0.

    source is (x, bias or None, thresholds or None, threshold): pointers to the row and to n elements each,
    and the threshold that all have in T where there are no others.
    """
    z = tl.load(element(source[0] + start, places), mask=inside, other=0)
    if source[1] is not None:
        added = z.to(T) + tl.load(element(source[1] + start, places), mask=inside, other=0).to(T)
        z = rounded(added, z.dtype)
    z = z.to(T)
    threshold = source[3]
    if source[2] is not None:
        threshold = tl.load(element(source[2] + start, places), mask=inside, other=0).to(T)
    return tl.where(inside, tl.where(z <= threshold, 0, z), -INF)


@triton.jit
def element(pointer, places):
    """pointer + places; those of a tile of two dimensions as tiles.places says."""
    here = pointer + places.to(tl.int64)
    if len(places.shape) == 2:
        here = tl.max_contiguous(here, [1, 1])
    return here


@triton.jit
def read(pointer, start, n, LARGEST: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """Elements start ... start + BLOCK - 1 in the compute dtype, negated for the smallest."""
    i = start + tl.arange(0, BLOCK)
    if LARGEST == ACTIVATED:
        x = activated(pointer, start, tl.arange(0, BLOCK), i < n, T)
    else:
        x = tl.load(pointer + i, mask=i < n, other=0).to(T)
        if not LARGEST:
            x = -x
        x = tl.where(i < n, x, -INF)
    return x


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
