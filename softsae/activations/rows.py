"""What every source of stored activations shares: shuffled batches of rows that lie on disk."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from softsae.activations.shuffle import Shuffle

BLOCK_BYTES = 64 * 2**20  # rows gathered at once, in the order in which they lie on disk


class RowSource:
    """Rows that are read by index; `batches` serves them globally shuffled.

    A subclass gives `name`, `rows`, `d`, `read` and, if it knows better, `place`.
    """

    name: str
    rows: int
    d: int

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
        block_rows = min(self.rows, BLOCK_BYTES // (4 * self.d))
        together = max(1, block_rows // batch_size)
        while True:
            rows = order.rows(start * batch_size, together * batch_size)
            ascending, inverse = np.unique(rows, return_inverse=True)
            block = self.read(ascending)
            yield from (block[torch.from_numpy(part)] for part in np.split(inverse, together))
            start += together

    def locate(self, batch_size: int, seed: int, batch: int, row: int) -> str:
        """Where row `row` of batch number `batch` of `batches` lies, for messages."""
        return self.place(int(Shuffle(self.rows, seed).rows(batch * batch_size + row, 1)[0]))

    def in_order(self, batch_size: int, nonfinite: str = "refuse") -> Iterator[Tensor]:
        """All rows once, in the order in which they are stored: (at most batch_size, d) float32.

        Rows with NaN or infinity raise ValueError, or are left out with nonfinite="skip".
        """
        for first in range(0, self.rows, batch_size):
            batch = self.read(np.arange(first, min(first + batch_size, self.rows)))
            good = torch.isfinite(batch).all(dim=1)
            if not good.all():
                if nonfinite == "refuse":
                    where = self.place(first + int((~good).int().argmax()))
                    raise ValueError(f"activations hold NaN or infinity: {where}")
                batch = batch[good]
            yield batch
