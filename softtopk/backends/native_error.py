"""What softtopk/squared_error.py does on csrc/cuda/squared_error.cu: contiguous x and y (B, d) on 16 bytes,
x in float32."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from softtopk.backends.native import TYPES


class ErrorKernels:
    """`where` gives the device and the stream of a tensor."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        sums = x.new_empty(self.launchers.squared_error_blocks(x.numel()), dtype=torch.float64)
        out = x.new_empty(())
        self.launchers.squared_error_forward(
            x.data_ptr(),
            y.data_ptr(),
            TYPES[y.dtype],
            *y.shape,
            sums.data_ptr(),
            out.data_ptr(),
            *self.where(x),
        )
        return out

    def backward(self, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        gradient = torch.empty_like(y)
        self.launchers.squared_error_backward(
            x.data_ptr(),
            y.data_ptr(),
            TYPES[y.dtype],
            *y.shape,
            g.data_ptr(),
            gradient.data_ptr(),
            *self.where(x),
        )
        return gradient
