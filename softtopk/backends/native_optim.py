"""What softtopk/optim.py does on csrc/cuda/adam.cu and csrc/cuda/clip.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from softtopk.optim import Update

ADDRESS, LENGTH, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class FlatRecord(ctypes.Structure):
    """csrc/softtopk.h's FlatParameter."""

    _fields_ = (
        *((name, ADDRESS) for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq", "copy")),
        ("size", LENGTH),
        ("lr", ADDRESS),
        *((name, NUMBER) for name in ("lr_number", "beta1", "beta2", "eps")),
        *((name, ADDRESS) for name in ("step", "scale")),
    )


class ClipRecord(ctypes.Structure):
    """csrc/softtopk.h's ClipPart."""

    _fields_ = ("data", ADDRESS), ("size", LENGTH), ("squared", LENGTH), ("group", LENGTH)


class OptimKernels:
    """`where` gives the device and the stream of a tensor."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where

    def adam_flat(self, updates: Sequence[Update], found_inf: Tensor | None) -> None:
        """A step on parameters of one device, all of them in a launch."""
        records = (FlatRecord * len(updates))(*(record(update) for update in updates))
        self.launchers.adam_flat(
            ctypes.addressof(records), len(records), address(found_inf), *self.where(updates[0].parameter)
        )

    def adam_rows(
        self, update: Update, found_inf: Tensor | None, offsets: Tensor | None, normalize: bool
    ) -> None:
        """A step on a parameter (n, ...) of which rows without entries, by int32 offsets (n + 1,), are left
        alone, or rows scaled to unit norm."""
        rows = len(update.parameter)
        of = record(update)
        self.launchers.adam_rows(
            *(getattr(of, name) or 0 for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq", "copy")),
            rows,
            of.size // max(rows, 1),
            of.lr or 0,
            of.lr_number,
            *update.betas,
            update.eps,
            of.step,
            of.scale or 0,
            address(found_inf),
            address(offsets),
            normalize,
            *self.where(update.parameter),
        )

    def clip_factors(
        self, groups: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], max_norms: Sequence[float]
    ) -> Tensor:
        """(2, groups) float32: factors and norms of groups of contiguous float32 tensors of one device, some
        of which are (squares, gradients)."""
        parts = [
            ClipRecord(part.data_ptr(), part.numel(), squared, index)
            for index, (squares, gradients) in enumerate(groups)
            for squared, tensors in ((1, squares), (0, gradients))
            for part in tensors
        ]
        records = (ClipRecord * len(parts))(*parts)
        like = next(part for squares, gradients in groups for part in (*squares, *gradients))
        blocks = sum(self.launchers.clip_blocks(record.size) for record in records)
        sums = like.new_empty(blocks, dtype=torch.float64)
        out = like.new_empty(2, len(groups))
        limits = (NUMBER * len(groups))(*max_norms)
        self.launchers.clip_factors(
            ctypes.addressof(records),
            len(records),
            ctypes.addressof(limits),
            len(groups),
            sums.data_ptr(),
            out.data_ptr(),
            *self.where(like),
        )
        return out


def record(update: Update) -> FlatRecord:
    by_tensor = isinstance(update.lr, Tensor)
    return FlatRecord(
        *(address(tensor) for tensor in update[:5]),
        update.parameter.numel(),
        address(update.lr) if by_tensor else 0,
        0.0 if by_tensor else float(update.lr),
        *update.betas,
        update.eps,
        address(update.step),
        address(update.scale),
    )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
