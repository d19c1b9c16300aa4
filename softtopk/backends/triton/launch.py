"""How a kernel is launched: tile sizes, per-row arguments, the current device."""

from __future__ import annotations

import contextlib
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of a row, in the compute dtype, that one program keeps in registers; a longer row is read
# again in every sweep, CHUNK_BYTES at a time.
RESIDENT_BYTES = 1 << 17
CHUNK_BYTES = 1 << 15
MOST = (1 << 31) - CHUNK_BYTES  # the places of the last chunk, those beyond n too, count in 32 bits


class Tile(NamedTuple):
    """Keyword arguments of every kernel. A row is CHUNKS blocks; each CHUNKS is compiled apart."""

    BLOCK: int
    CHUNKS: int
    num_warps: int
    maxnreg: int


def tile(n: int, dtype: torch.dtype, arrays: int = 1, per_thread: int = 16) -> Tile:
    """The tile for rows of n elements when `arrays` such rows are kept, in the compute dtype.

    16 elements a thread and 64 registers (128 in float64) fill a multiprocessor's register file
    with 65,536 bytes of row per array; ptxas reports next to no spills up to there. A kernel that
    needs more registers beside its row has fewer elements `per_thread`, and shorter rows in registers.
    """
    if n > MOST:
        raise ValueError(f"x has rows of n={n} elements; the triton backend takes at most {MOST}")
    size = dtype.itemsize
    block = triton.next_power_of_2(n)
    if block * size * arrays * 16 > RESIDENT_BYTES * per_thread:
        block = CHUNK_BYTES // size
    return Tile(block, triton.cdiv(n, block), max(1, min(128 // size, block // (32 * per_thread))), 16 * size)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


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
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
