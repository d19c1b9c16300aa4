"""The candidates of a row of at most 128 elements a thread: found by each thread, and kept by it.

What candidates are, and why so few decide a row, says candidates.py. Here each of the LANES threads
has GROUPS maxima, and marks the candidates among its elements with one bit each. Few threads have
more than a few, so each takes at most SLOTS of its own, read again by their marks: no exchange
between threads, and nothing is written. A row of which a thread has more is solved as a whole.
"""

import triton
import triton.language as tl

from softtopk.backends.triton.candidates import lower_bound
from softtopk.backends.triton.sweeps import ACTIVATED, INF, activated, distance, plain, sums
from softtopk.backends.triton.tiles import lanes

MOST = tl.constexpr(1023)  # candidates: three counts share a word


@triton.jit
def group_maxima(
    tiles, pointer, n,
    LARGEST: tl.constexpr, FULL: tl.constexpr, KEEP: tl.constexpr,
    TILES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Each lane's maxima of every GROUPS-th tile, a tuple of GROUPS tensors."""
    maxima = ()
    for g in tl.static_range(GROUPS):
        most = tl.max(lanes(tiles, g, pointer, n, LARGEST, FULL, KEEP, DEPTH, LANES), 1)
        for i in tl.static_range(g + GROUPS, TILES, GROUPS):
            x = lanes(tiles, i, pointer, n, LARGEST, FULL, KEEP, DEPTH, LANES)
            most = tl.maximum(most, tl.max(x, 1))
        maxima += (most,)
    return maxima


@triton.jit
def marks(x, kept, FIRST: tl.constexpr):
    """Per lane one bit for each element of a tile that is kept, from bit FIRST up."""
    bit = tl.full([1, x.shape[1]], 1, tl.int32) << (tl.arange(0, x.shape[1])[None, :] + FIRST)
    return tl.sum(tl.where(kept, bit, 0), 1)


@triton.jit
def lowest_mark(word):
    """The place of the lowest bit of each; of no bit, any."""
    bit = word & -word
    return ((bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def kept_candidates(
    tiles, pointer, n, k, scale, rate,
    LARGEST: tl.constexpr, FULL: tl.constexpr, KEEP: tl.constexpr,
    TILES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """(tile, m, floor, tail, top, found): the m elements >= floor are in the tile, beside -inf, and tail is
    the sum of exp((x - floor) / alpha) over the others, NaN where one of those is. top is the largest.

    Not found where k is large beside LANES * GROUPS, or not positive, where an element is +inf or the
    exponents are not plain, or where candidates are too many: the tile then holds the first elements.
    """
    T: tl.constexpr = tiles[0].dtype
    PER_WORD: tl.constexpr = min(TILES, 32 // DEPTH)
    WORDS: tl.constexpr = TILES // PER_WORD
    maxima = group_maxima(tiles, pointer, n, LARGEST, FULL, KEEP, TILES, DEPTH, LANES, GROUPS)
    needed = tl.floor(tl.where(k > 0, tl.minimum(k, LANES * GROUPS), 0) * 2).to(tl.int32) + 1
    needed = tl.where(k > 0, needed, 0)
    floor, top, found = lower_bound(maxima, needed, GROUPS)
    origin = floor * rate
    found = found & plain(scale, origin)

    lane = tl.arange(0, LANES)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    place = lane + slot * LANES
    m = tl.zeros((), tl.int32)
    tail = tl.zeros((), T)
    if found:
        below = tl.zeros([LANES], T)
        words = ()
        for w in tl.static_range(WORDS):
            word = tl.zeros([LANES], tl.int32)
            for j in tl.static_range(PER_WORD):
                x = lanes(tiles, w * PER_WORD + j, pointer, n, LARGEST, FULL, KEEP, DEPTH, LANES)
                kept = x >= floor
                below += tl.sum(tl.where(kept, 0, tl.exp2(distance(x, floor, rate, origin))), 1)
                word |= marks(x, kept, j * DEPTH)
            words += (word,)
        number = tl.zeros([LANES], tl.int32)
        places = tl.full([LANES, SLOTS], -1, tl.int32)
        for s in tl.static_range(SLOTS):
            word = words[0]
            first = tl.zeros([LANES], tl.int32)
            rest = (word & (word - 1),)
            for w in tl.static_range(1, WORDS):
                empty = word == 0
                rest += (tl.where(empty, words[w] & (words[w] - 1), words[w]),)
                first = tl.where(empty, w * 32, first)
                word = tl.where(empty, words[w], word)
            words = rest
            i = tl.where(word == 0, -1, tl.arange(0, LANES) + (lowest_mark(word) + first) * LANES)
            places = tl.where(slot == s, i[:, None], places)
            number += (word != 0).to(tl.int32)
        left = words[0]
        for w in tl.static_range(1, WORDS):
            left |= words[w]
        number += tl.where(left != 0, 2 * MOST, 0)
        tail, m = sums(below, number)
        tail *= tl.exp2(distance(floor, floor, rate, origin) * -1)
        found = m <= MOST
        place = tl.where(found, places, place)
    inside = (place >= 0) & (place < n)
    if LARGEST == ACTIVATED:
        tile = activated(pointer, 0, place, inside, T)
    else:
        here = tl.max_contiguous(pointer + place, [1, 1])
        tile = tl.load(here, mask=inside, other=-INF if LARGEST else INF).to(T)
        tile = tile if LARGEST else -tile
    tile = tl.reshape(tile, [LANES * SLOTS], can_reorder=True)
    return tile, m, floor, tail, top, found
