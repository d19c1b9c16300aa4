"""What softtopk/activity.py does on csrc/cuda/activity.cu: contiguous latents, or codes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from softtopk.backends.native import TYPES
from softtopk.sparse_code import SparseCode


class ActivityKernels:
    """`where` gives the device and the stream of a tensor."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where
        self.most_latents = launchers.most_latents()

    def of_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """fired (n,) bool and the counts (3,) int64 of latents (rows, n)."""
        found = room(latents, latents.shape[1])
        self.launchers.latents_activity(
            latents.data_ptr(), TYPES[latents.dtype], *latents.shape, found.data_ptr(), *self.where(latents)
        )
        return split(found)

    def of_code(self, code: SparseCode) -> tuple[Tensor, Tensor]:
        """The same of a code."""
        values, indices, counts = (t.contiguous() for t in (code.values, code.indices, code.counts))
        n = code.shape[-1]
        found = room(values, n)
        self.launchers.codes_activity(
            values.data_ptr(),
            TYPES[values.dtype],
            indices.data_ptr(),
            counts.data_ptr(),
            *values.shape,
            n,
            found.data_ptr(),
            *self.where(values),
        )
        return split(found)


def room(like: Tensor, n: int) -> Tensor:
    return like.new_empty(24 + n, dtype=torch.uint8)


def split(found: Tensor) -> tuple[Tensor, Tensor]:
    return found[24:].view(torch.bool), found[:24].view(torch.int64)
