"""What every source of stored activations shares: shuffled batches of rows that lie on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from softsae.activations.shuffle import Shuffle

BLOCK_BYTES = 64 * 2**20  # rows gathered at once, in the order in which they lie on disk
ON_NONFINITE = ("refuse", "skip")


class RowSource:
    """Rows that are read by index; `batches` serves them globally shuffled.

    A subclass gives `name`, `rows`, `d` and `read`.

    Args:
        on_nonfinite: "refuse" raises at the first row with NaN or infinity, "skip" puts another row
            of the same batch in its place, so that batches keep their size, and warns once.
    """

    name: str
    rows: int
    d: int

    def __init__(self, on_nonfinite: str = "refuse"):
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite={on_nonfinite!r} is unknown; choose {' or '.join(ON_NONFINITE)}")
        self.on_nonfinite = on_nonfinite
        self._warned = False

    def __len__(self) -> int:
        return self.rows

    def read(self, rows: np.ndarray) -> Tensor:
        """Rows by ascending index as (len(rows), d), float32."""
        raise NotImplementedError

    def place(self, row: int) -> str:
        """Where a row lies, for messages."""
        return f"row {row} of {self.name}"

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        """Endless batches (batch_size, d) float32 on the CPU, from batch number `start` on.

        Every epoch is a new permutation of all rows, fixed by `seed`; epochs follow each other
        without a gap, so a batch may hold the end of one and the beginning of the next. Rows are
        gathered for several batches at once and in ascending order, which is how disks like it.
        """
        order = Shuffle(self.rows, seed)
        together = max(1, BLOCK_BYTES // (4 * self.d * batch_size))
        while True:
            rows = order.rows(start * batch_size, together * batch_size)
            ascending, inverse = np.unique(rows, return_inverse=True)
            block = self.read(ascending)[torch.from_numpy(inverse)]
            for i in range(together):
                here = slice(i * batch_size, (i + 1) * batch_size)
                yield self.finite(block[here], rows[here])
            start += together

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """All rows once, in the order in which they are stored: (≤ batch_size, d) float32."""
        for first in range(0, self.rows, batch_size):
            rows = np.arange(first, min(first + batch_size, self.rows))
            yield self.finite(self.read(rows), rows)

    def finite(self, batch: Tensor, rows: np.ndarray) -> Tensor:
        """The batch, with non-finite rows refused or another one of the batch in their place."""
        bad = ~torch.isfinite(batch).all(dim=1)
        if not bad.any():
            return batch
        first = int(bad.int().argmax())
        column = int((~torch.isfinite(batch[first])).int().argmax())
        found = (
            f"{self.place(int(rows[first]))} has the value {batch[first, column].item()} in column {column}"
        )
        if self.on_nonfinite == "refuse":
            raise ValueError(f"non-finite activation: {found}. on_nonfinite='skip' leaves such rows out")
        good = torch.nonzero(~bad).squeeze(1)
        if not len(good):
            raise ValueError(f"non-finite activations in all {len(batch)} rows of a batch: {found}")
        if not self._warned:
            warnings.warn(f"non-finite activation skipped: {found}; further ones are not reported",
                          RuntimeWarning, stacklevel=3)
            self._warned = True
        batch = batch.clone()
        where = torch.nonzero(bad).squeeze(1)
        batch[where] = batch[good[torch.arange(len(where)) % len(good)]]
        return batch
