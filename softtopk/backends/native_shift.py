"""What softtopk/shift.py does on csrc/cuda/shift.cu: contiguous tensors, shift and scale in float32."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from softtopk.backends.native import TYPES


class ShiftKernels:
    """`where` gives the device and the stream of a tensor."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where

    def rows(self, x: Tensor, shift: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = torch.empty_like(x, dtype=dtype)
        d = x.shape[-1]
        self.launchers.shift_rows(
            x.data_ptr(),
            TYPES[x.dtype],
            x.numel() // max(d, 1),
            d,
            shift.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            out.data_ptr(),
            TYPES[dtype],
            *self.where(x),
        )
        return out
