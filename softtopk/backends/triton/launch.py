"""How a kernel is launched: tile sizes, per-row arguments, the current device.

The tile sizes follow from RULES and TUNED: for an H200, a few of them timed there, the others
estimates. With SOFTTOPK_AUTOTUNE=1 in the environment they are measured instead, see autotune.py.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.triton import autotune

MOST = (1 << 31) - (1 << 18)  # the places of the last tile, those beyond n too, count in 32 bits
SCAN = 512  # elements of a chunk of candidates, and the fewest lanes of a longer row


class Choice(NamedTuple):
    """Warps of a program, and the registers a thread may use, which decide what of a row is kept there."""

    num_warps: int
    maxnreg: int


# Pass and bytes of an element of x: elements of a row per thread, most warps, registers. Estimates.
RULES = {
    ("forward", 2): (32, 16, 64),
    ("forward", 4): (32, 16, 64),
    ("forward", 8): (32, 16, 128),
    ("log", 2): (8, 4, 128),
    ("log", 4): (8, 4, 128),
    ("log", 8): (8, 4, 128),
    ("backward", 2): (16, 32, 64),
    ("backward", 4): (16, 32, 64),
    ("backward", 8): (16, 16, 128),
    ("log_backward", 2): (8, 32, 64),
    ("log_backward", 4): (8, 32, 64),
    ("log_backward", 8): (8, 16, 128),
    ("hard_topk", 2): (16, 32, 64),
    ("hard_topk", 4): (16, 32, 64),
    ("hard_topk", 8): (16, 16, 128),
    ("code", 2): (32, 16, 64),
    ("code", 4): (32, 16, 64),
    ("code", 8): (32, 16, 128),
}
# Exceptions: (pass, bytes of an element of x, length class), where a length class is a power of two
# and holds the lengths up to it and above the one before. Timed on an H200, at the length that names
# the class, are those marked so (2 bytes: in bfloat16); the others are estimates.
TUNED: dict[tuple[str, int, int], Choice] = {
    ("forward", 2, 16384): Choice(8, 64),  # timed
    ("forward", 2, 131072): Choice(32, 64),
    ("forward", 4, 4096): Choice(4, 80),  # timed
    ("forward", 4, 16384): Choice(8, 80),  # timed
    ("forward", 4, 32768): Choice(8, 128),  # timed
    ("forward", 4, 131072): Choice(32, 64),
    ("code", 2, 131072): Choice(32, 64),
    ("code", 4, 131072): Choice(32, 64),
}
# Of its registers a pass gives one in so many to rows: the others hold what it computes from them.
SHARE = {"backward": 2, "log_backward": 4, "hard_topk": 4}
OTHERS = 56  # registers of a thread that the forward needs beside a row it keeps
LENGTHS = (1 << 8, 1 << 17)  # the smallest and the largest length class


def length_class(n: int) -> int:
    return min(max(triton.next_power_of_2(n), LENGTHS[0]), LENGTHS[1])


@functools.lru_cache
def default(name: str, itemsize: int, n: int) -> Choice:
    length = length_class(n)
    per_thread, most, maxnreg = RULES[name, itemsize]
    warps = max(1, min(most, length // (32 * per_thread)))
    return TUNED.get((name, itemsize, length), Choice(warps, maxnreg))


def choices(name: str, itemsize: int, n: int) -> list[Choice]:
    """What autotuning tries: the default first, then other numbers of warps and of registers."""
    first = default(name, itemsize, n)
    found = [first]
    for warps in (first.num_warps // 2, first.num_warps, first.num_warps * 2):
        for maxnreg in (64, 80, 128, 168):
            choice = Choice(warps, maxnreg)
            if 1 <= warps <= 32 and warps * 32 * maxnreg <= 65536 and choice not in found:
                found.append(choice)
    return found


@functools.lru_cache
def tile(name: str, choice: Choice, itemsize: int, n: int) -> dict[str, int | bool]:
    """The keyword arguments of a kernel that follow from a choice."""
    if n > MOST:
        raise ValueError(f"x has rows of n={n} elements; the triton backend takes at most {MOST}")
    row = max(32, triton.next_power_of_2(n))  # one lane, for one, does not compile
    threads = 32 * choice.num_warps
    words = 2 if itemsize == 8 else 1
    options = dict(num_warps=choice.num_warps, maxnreg=choice.maxnreg)
    if name == "log":
        return options | dict(BLOCK=min(row, 8 * threads))
    if name == "forward":
        return options | forward_tile(n, row, threads, choice.maxnreg, words)
    if name == "code":
        shape = forward_tile(n, row, threads, choice.maxnreg, words)
        return options | shape | dict(CHUNK=min(row, 8 * threads), ALIGNED=n % 16 == 0)
    room = threads * choice.maxnreg // (words * SHARE[name])  # elements that registers hold
    if name in ("hard_topk", "log_backward"):
        room //= 2 if name == "log_backward" else 1
        block = min(row, previous_power_of_2(room))
        return options | dict(RESIDENT=block == row, BLOCK=block)
    block = min(row, previous_power_of_2(threads * choice.maxnreg // (16 * words)))
    tiles = row // block if row <= 2 * room else 1
    kept = dict(KEEP_X=row <= room, KEEP_V=2 * row <= room)
    return options | kept | dict(TILES=tiles, BLOCK=block, FULL=n % (tiles * block) == 0)


def forward_tile(n: int, row: int, threads: int, maxnreg: int, words: int) -> dict[str, int | bool]:
    """One sweep's tiles hold all of a row where that is 128 elements a thread or less, see kept.py."""
    each = row // threads
    if 1 <= each <= 128:
        tiles = min(each, 8)
        groups = min(tiles, max(1, 1024 // threads))
        slots = min(each, 8 if threads >= 128 else 16)
        shape = dict(TILES=tiles, DEPTH=each // tiles, LANES=threads, GROUPS=groups, SLOTS=slots)
        keep = each * words + OTHERS <= maxnreg
        return shape | dict(KEEP=keep, BLOCK=threads * slots, FULL=n == row)
    block = min(row, max(SCAN, previous_power_of_2(threads * maxnreg // (8 * words))))
    lanes = min(block, SCAN if threads <= SCAN // 4 else 2 * SCAN)
    shape = dict(TILES=0, DEPTH=block // lanes, LANES=lanes, GROUPS=1, SLOTS=1)
    return shape | dict(KEEP=False, BLOCK=min(row, SCAN), FULL=n % block == 0)


def previous_power_of_2(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def run(name: str, kernel, x: Tensor, arguments: tuple, **constants) -> None:
    """Launch a kernel with one program per row of x."""
    rows, n = x.shape
    itemsize = x.element_size()
    dtype = tl.float64 if itemsize == 8 else tl.float32

    def start(choice: Choice) -> None:
        kernel[(rows,)](*arguments, **constants, T=dtype, **tile(name, choice, itemsize, n))

    with on_device(x):
        first = default(name, itemsize, n)
        if autotune.enabled():
            key = (name, str(x.dtype).removeprefix("torch."), length_class(n))
            first = Choice(*autotune.choose(key, x, first, choices(name, itemsize, n), start))
        start(first)


def per_row(value: float | Tensor) -> tuple[Tensor | None, int, int]:
    """(pointer, stride, bits) of a number or a (rows,) tensor, for `sweeps.per_row`.

    A Python float would reach the kernel as float32, so a number travels as its 64 bits.
    """
    if isinstance(value, Tensor):
        return value, value.stride(0), 0
    return None, 0, bits(value)


def bits(value: float) -> int:
    """The 64 bits of a number."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@functools.lru_cache
def columns(d: int, itemsize: int, most: int = 512) -> tuple[int, int]:
    """(columns, warps) of a tile of a matrix with d columns: least padding, then the widest; a thread's
    elements are 16 bytes or, in a single warp, more."""
    widths = [w for w in (512, 256, 128) if w <= most]
    tile = min(widths, key=lambda width: -(-d // width) * width)
    tile = min(tile, max(32, triton.next_power_of_2(d)))
    return tile, max(1, tile * itemsize // 512)


def reads(x: Tensor) -> bool:
    """Whether a 2-D x is read as it lies: where its rows lie as those of a contiguous tensor do.

    The compiler lays a tile out by what it knows of the alignment of pointers and strides, and the
    order of every sum follows the layout: only equal alignment gives equal bits.
    """
    n = x.shape[1]
    aligned = x.stride(1) == 1 and x.data_ptr() % 16 == 0
    return aligned and (x.stride(0) % 16 == 0) == (n % 16 == 0) and (x.stride(0) == 1) == (n == 1)


def rows_of(x: Tensor) -> Tensor:
    return x if reads(x) else x.contiguous()


def on_device(x: Tensor):
    """Triton launches on the current device: make it x's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
