"""Tiles of LANES x DEPTH elements of a row, element i in lane i mod LANES.

A thread holds whole columns of a tile, so that a reduction of a lane takes no exchange between
threads. Tiles are small because a compiler that is given all of a row at once keeps several
intermediate results of all of it.
"""

import triton
import triton.language as tl

from softtopk.backends.triton.sweeps import ACTIVATED, INF, activated


@triton.jit
def places(pointer, start, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """Those of a tile's elements in the row, and the pointers there. These are said not to be contiguous:
    the places of candidates are not, and another layout would move tiles through shared memory."""
    within = tl.arange(0, LANES)[:, None] + tl.arange(0, DEPTH)[None, :] * LANES
    # In 64 bits, or the sums might wrap and each address would be computed on its own.
    return start + within, tl.max_contiguous((pointer + start) + within.to(tl.int64), [1, 1])


@triton.jit
def read_lanes(
    pointer, start, n,
    LARGEST: tl.constexpr, FULL: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Elements start ... start + DEPTH * LANES - 1 in the compute dtype, negated for the smallest."""
    if LARGEST == ACTIVATED:
        i, _ = places(pointer[0], start, DEPTH, LANES)
        x = activated(pointer, start, i - start, i < n, T)
    else:
        i, here = places(pointer, start, DEPTH, LANES)
        if FULL:
            x = tl.load(here)
        else:
            x = tl.load(here, mask=i < n, other=-INF if LARGEST else INF)
        x = x.to(T)
        x = x if LARGEST else -x
    return x


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
    tiles, i: tl.constexpr, pointer, n,
    LARGEST: tl.constexpr, FULL: tl.constexpr, KEEP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Tile i of a row that is kept, or read again: from the cache, if it is short."""
    if KEEP:
        x = tiles[i]
    else:
        x = read_lanes(pointer, i * DEPTH * LANES, n, LARGEST, FULL, DEPTH, LANES, tiles[0].dtype)
    return x
