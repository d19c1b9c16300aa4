"""How a kernel is launched: tile sizes, per-row arguments, the current device.

The tile sizes are those of TUNED, measured on an H200, or follow from RULES. With
SOFTTOPK_AUTOTUNE=1 in the environment they are measured instead, see autotune.py.
"""

from __future__ import annotations

import contextlib
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
    """A program has num_warps warps, and a tile of as many elements per thread, or fewer for a short row;
    a row longer than the tile is read again in every sweep. ptxas may use maxnreg registers a thread."""

    num_warps: int
    per_thread: int
    maxnreg: int


# Pass and bytes of an element of x: elements per thread, most warps, registers. In registers are one
# row in the forward passes and hard_topk, two in the backward passes.
RULES = {
    ("forward", 2): (64, 16, 128),
    ("forward", 4): (64, 16, 128),
    ("forward", 8): (32, 16, 128),
    ("log_forward", 2): (32, 32, 64),
    ("log_forward", 4): (32, 32, 64),
    ("log_forward", 8): (16, 16, 128),
    ("backward", 2): (16, 32, 64),
    ("backward", 4): (16, 32, 64),
    ("backward", 8): (16, 16, 128),
    ("log_backward", 2): (8, 32, 64),
    ("log_backward", 4): (8, 32, 64),
    ("log_backward", 8): (8, 16, 128),
    ("hard_topk", 2): (16, 32, 64),
    ("hard_topk", 4): (16, 32, 64),
    ("hard_topk", 8): (16, 16, 128),
}
# Exceptions: (pass, bytes of an element of x, length class), where a length class is a power of two
# and holds the lengths up to it and above the one before.
TUNED: dict[tuple[str, int, int], Choice] = {
}
LENGTHS = (1 << 8, 1 << 17)  # the smallest and the largest length class


def length_class(n: int) -> int:
    return min(max(triton.next_power_of_2(n), LENGTHS[0]), LENGTHS[1])


def default(name: str, itemsize: int, n: int) -> Choice:
    length = length_class(n)
    per_thread, most, maxnreg = RULES[name, itemsize]
    warps = max(1, min(most, length // (32 * per_thread)))
    return TUNED.get((name, itemsize, length), Choice(warps, per_thread, maxnreg))


def choices(name: str, itemsize: int, n: int) -> list[Choice]:
    """What autotuning tries: the default, fewer and more threads for the same tile, a smaller tile."""
    first = default(name, itemsize, n)
    found = [first]
    for warps, per_thread in ((2, 0.5), (0.5, 2), (1, 0.5), (0.5, 1)):
        warps, per_thread = int(first.num_warps * warps), int(first.per_thread * per_thread)
        if 1 <= warps <= 32 and 4 <= per_thread <= 128:
            maxnreg = min(255, 65536 // (32 * warps), max(64, first.maxnreg * per_thread // first.per_thread))
            found.append(Choice(warps, per_thread, maxnreg))
    return found


def tile(name: str, choice: Choice, itemsize: int, n: int) -> dict[str, int | bool]:
    """The keyword arguments of a kernel that follow from a choice."""
    if n > MOST:
        raise ValueError(f"x has rows of n={n} elements; the triton backend takes at most {MOST}")
    block = min(triton.next_power_of_2(n), 32 * choice.num_warps * choice.per_thread)
    options = dict(num_warps=choice.num_warps, maxnreg=choice.maxnreg)
    if not name.endswith("forward"):
        return options | dict(RESIDENT=block >= n, BLOCK=block)
    # A tile has 16 elements a thread, in whole lanes.
    one = min(block, max(SCAN, 32 * choice.num_warps * 16))
    lanes = min(one, max(SCAN, 32 * choice.num_warps))
    shape = dict(TILES=block // one if block >= n else 0, DEPTH=one // lanes, LANES=lanes)
    return options | shape | dict(FULL=n % block == 0, BLOCK=min(block, SCAN))


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
    """(pointer, stride, bits) of a number or a (rows,) tensor, for `solve.per_row`.

    A Python float would reach the kernel as float32, so a number travels as its 64 bits.
    """
    if isinstance(value, Tensor):
        return value, value.stride(0), 0
    return None, 0, struct.unpack("<q", struct.pack("<d", value))[0]


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
