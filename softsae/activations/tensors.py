"""Activations that are already tensors: one in memory, or an iterator of batches.

A source has `.d`, the width, and `.batches(batch_size, seed, start)`: an endless iterator of float32
tensors (batch_size, d) that depends on its arguments only, `start` being the number of batches
already consumed, so that an interrupted run goes on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads (seed, index) over the generator's seeds


def generator_for(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the pair only, so that any epoch or batch can be drawn alone."""
    mixed = ((seed * MIX) ^ (index + 1) * (MIX >> 3 | 1)) & (2**63 - 1)
    return torch.Generator(device).manual_seed(mixed)


def check_activations(x: Tensor, name: str):
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; activations are floats")
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; (samples, d) with samples and d >= 1 is needed")


class TensorSource:
    """A tensor (samples, d), visited in a new seeded permutation every epoch; batches cross epochs.

    Raises TypeError for a dtype that is no float, ValueError for another shape.
    """

    def __init__(self, x: Tensor):
        check_activations(x, "the tensor of activations")
        self.x = x
        self.d = x.shape[1]

    def __len__(self) -> int:
        return self.x.shape[0]

    def read(self, rows: np.ndarray) -> Tensor:
        """Rows by index as (len(rows), d), float32."""
        return self.x[torch.from_numpy(rows).to(self.x.device)].float()

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        samples = len(self)
        epoch, position = divmod(start * batch_size, samples)
        order = self.order(seed, epoch)
        while True:
            parts, wanted = [], batch_size
            while wanted:
                part = order[position : position + wanted]
                parts.append(part)
                wanted -= len(part)
                position += len(part)
                if position == samples:
                    epoch, position = epoch + 1, 0
                    order = self.order(seed, epoch)
            yield self.x[torch.cat(parts)].float()

    def order(self, seed: int, epoch: int) -> Tensor:
        permutation = torch.randperm(len(self), generator=generator_for(seed, epoch))
        return permutation.to(self.x.device)


class IteratorSource:
    """Any iterable of tensors (rows, d), cut into batches in its own order.

    An iterable that can be iterated again is, when it ends; one that cannot ends the training.
    `start` skips by reading. Pairs of tensors, (rows, d) and (rows, d_out), are laid side by side.
    Raises TypeError, ValueError as TensorSource, for the first tensor.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = tensors
        self.one_shot = iter(tensors) is tensors
        iterator = iter(tensors)
        first = next(iterator, None)
        found = "nothing" if first is None else type(first).__name__
        pair = is_pair(first)
        for part in first if pair else [first]:
            if not isinstance(part, Tensor):
                raise TypeError(f"the iterator of activations yields {found}, not tensors")
            check_activations(part, "the first tensor of the iterator")
        self.first = chain([first], iterator) if self.one_shot else None
        self.d, self.d_out = (part.shape[1] for part in first) if pair else (first.shape[1], None)

    def pieces(self) -> Iterator[Tensor]:
        if self.one_shot:
            if self.first is None:
                raise ValueError("the iterator of activations was already consumed; give a new one")
            pieces, self.first = self.first, None
            yield from pieces
            return
        while True:
            yield from self.tensors

    def whole(self, piece) -> Tensor:
        """A checked piece; a pair side by side."""
        if is_pair(piece) != (self.d_out is not None):
            raise TypeError("the iterator of activations yields both tensors and pairs of tensors")
        parts = [(piece, self.d)] if self.d_out is None else zip(piece, (self.d, self.d_out), strict=True)
        for part, d in parts:
            check_activations(part, "a tensor of the iterator")
            if part.shape[1] != d:
                raise ValueError(f"a tensor of the iterator has d={part.shape[1]}, the first had {d}")
        if self.d_out is None:
            return piece
        x, target = piece
        if len(x) != len(target):
            raise ValueError(f"a pair of the iterator has {len(x)} rows and {len(target)} targets")
        return torch.cat([x.float(), target.float()], 1)

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        kept, rows, skipped = [], 0, start
        for piece in map(self.whole, self.pieces()):
            kept.append(piece.float())
            rows += len(piece)
            if rows < batch_size:
                continue
            joined = torch.cat(kept)
            whole = rows - rows % batch_size
            for batch in joined[:whole].split(batch_size):
                if skipped:
                    skipped -= 1
                else:
                    yield batch
            kept, rows = [joined[whole:]], rows - whole


def is_pair(piece) -> bool:
    return isinstance(piece, (tuple, list)) and len(piece) == 2


def as_source(activations):
    """A source as it is; a tensor or an iterable of tensors as one."""
    if hasattr(activations, "batches"):
        return activations
    if isinstance(activations, Tensor):
        return TensorSource(activations)
    if isinstance(activations, Iterable) and not isinstance(activations, (str, bytes)):
        return IteratorSource(activations)
    raise TypeError(f"activations must be a source, a tensor or tensors, not {type(activations).__name__}")
