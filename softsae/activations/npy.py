"""Activations in an .npy file, read through a memory map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softsae.activations.rows import RowSource

DTYPES = ("float16", "float32", "float64")


class NpySource(RowSource):
    """A 2-D .npy file (rows, d) of float16, float32 or float64, served in shuffled batches.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an .npy file, another shape or dtype, Fortran order, or fewer bytes than its
            header promises. The message names the file and what it found.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.name = str(path)
        if not path.is_file():
            raise FileNotFoundError(f".npy file {self.name!r} does not exist")
        shape, fortran, dtype, offset = read_header(path)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{self.name!r} has shape {shape}; (rows, d) with no zero is needed")
        if dtype.hasobject or dtype.name not in DTYPES:
            raise ValueError(f"{self.name!r} has dtype {dtype}; {', '.join(DTYPES)} can be read")
        if fortran:
            raise ValueError(f"{self.name!r} is stored column by column (fortran_order); save it in C order")
        wanted, found = offset + dtype.itemsize * shape[0] * shape[1], path.stat().st_size
        if found < wanted:
            raise ValueError(
                f"{self.name!r} is truncated: {found} bytes, {wanted} needed for {shape} {dtype}"
            )
        self.rows, self.d = shape
        self.array = np.memmap(path, dtype, mode="r", offset=offset, shape=shape)

    def read(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.array[rows], dtype=np.float32))


def read_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, fortran order, dtype, offset of the data) of an .npy file."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                version, np.lib.format.read_array_header_2_0
            )
            return (*read(file), file.tell())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not an .npy file: {error}") from None
