"""Inputs and their targets, for a transcoder: the same rows of two stores, shuffled together.

Such a source has `.d`, the width of the inputs, and `.d_out`, that of the targets; its batches
(batch_size, d + d_out) hold them side by side.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from softsae.activations.rows import RowSource
from softsae.activations.shards import ShardSource
from softsae.activations.tensors import TensorSource


class PairSource(RowSource):
    """Row i of a source of stored activations, and beside it row i of its target.

    Args:
        source, target: tensors, .npy files or folders of shards that are open already (`as_source`).

    Raises:
        TypeError: one of another kind, whose rows cannot be read by their index.
        ValueError: another number of rows, or shards of other positions of the text.
    """

    def __init__(self, source, target):
        self.source = by_index(source, "the activations")
        self.target = by_index(target, "the target")
        self.name = f"{self.source.name} with {self.target.name}"
        self.d, self.d_out, self.rows = source.d, target.d, len(self.source)
        if len(self.target) != self.rows:
            raise ValueError(
                f"{self.source.name} has {self.rows} rows, its target {self.target.name} {len(self.target)}"
            )
        if isinstance(source, ShardSource) and isinstance(target, ShardSource):
            same_positions(source, target)

    def read(self, rows: np.ndarray) -> Tensor:
        x = self.source.read(rows)
        return torch.cat([x, self.target.read(rows).to(x.device)], 1)

    def place(self, row: int) -> str:
        return f"{self.source.place(row)} or its target, {self.target.place(row)}"


class TensorRows(RowSource):
    """The rows of a tensor, under a name."""

    def __init__(self, source: TensorSource, name: str):
        self.source, self.name, self.rows, self.d = source, name, len(source), source.d

    def read(self, rows: np.ndarray) -> Tensor:
        return self.source.read(rows)


def by_index(source, name: str) -> RowSource:
    if isinstance(source, TensorSource):
        return TensorRows(source, name)
    if isinstance(source, RowSource):
        return source
    kind = type(source).__name__
    raise TypeError(f"{name} ({kind}) cannot be paired by row: give an iterable of pairs (x, target)")


def same_positions(source: ShardSource, target: ShardSource):
    """Raises ValueError where the rows of two folders of shards are not from the same places in a text."""
    differ = (source.sequence != target.sequence) | (source.position != target.position)
    if differ.any():
        row = int(differ.argmax())
        places = [f"position {s.position[row]} of sequence {s.sequence[row]}" for s in (source, target)]
        raise ValueError(f"row {row} of {source.name} is {places[0]}, that of {target.name} {places[1]}")
