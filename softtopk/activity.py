"""Which latents of a batch are active, and how many: what training keeps an eye on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softtopk import dispatch
from softtopk.functional import FLOATS
from softtopk.sparse_code import SparseCode


class Activity(NamedTuple):
    """fired (n,) bool: the latents that are not 0 in some row. On the device, () int64: active, the values
    that are not 0; entries of a code, those of value 0 and those it had no room for too, of dense latents the
    same as active; most, the most entries of a row."""

    fired: Tensor
    active: Tensor
    entries: Tensor
    most: Tensor


@torch.no_grad()
def activity(latents: Tensor | SparseCode) -> Activity:
    """Of latents (rows, n), or of a code; on a GPU in one pass over them. The host does not wait."""
    if isinstance(latents, SparseCode):
        kernels = native(latents.values, latents.shape[-1])
        if kernels is not None:
            return of_counts(*kernels.of_code(latents))
        counts, active = latents.counts, (latents.values != 0).sum()
        return Activity(latents.fired(), active, counts.sum(), most_of(counts))
    kernels = native(latents, latents.shape[1])
    if kernels is not None:
        return of_counts(*kernels.of_latents(latents))
    nonzero = latents != 0
    counts = nonzero.sum(1)
    total = counts.sum()
    return Activity(nonzero.any(0), total, total, most_of(counts))


def native(values: Tensor, n: int):
    """The CUDA backend's kernels, where they take latents of these values; else None."""
    if not (values.is_cuda and values.dtype in FLOATS and values.is_contiguous()):
        return None
    module = dispatch.module("cuda")
    return None if module is None or n > module.activities.most_latents else module.activities


def of_counts(fired: Tensor, counts: Tensor) -> Activity:
    return Activity(fired, *counts.unbind())


def most_of(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.long(), (0, 1)).max()  # 0 of no rows
