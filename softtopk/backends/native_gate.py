"""What softtopk/gate.py does on csrc/cuda/gate.cu: contiguous tensors of one dtype, on 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from softtopk.backends.native import TYPES


class GateKernels:
    """`where` gives the device and the stream of a tensor."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where

    def forward(self, a: Tensor, p: Tensor, cut: float) -> Tensor:
        out = torch.empty_like(a)
        self.launchers.gate_forward(
            a.data_ptr(), p.data_ptr(), TYPES[a.dtype], cut, a.numel(), out.data_ptr(), *self.where(a)
        )
        return out

    def backward(
        self, a: Tensor, p: Tensor, g: Tensor, cut: float, rectified: bool, want_p: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of a and, if it is wanted, p."""
        of_a, of_p = torch.empty_like(a), torch.empty_like(p) if want_p else None
        self.launchers.gate_backward(
            a.data_ptr(),
            p.data_ptr(),
            g.data_ptr(),
            TYPES[a.dtype],
            cut,
            rectified,
            a.numel(),
            of_a.data_ptr(),
            0 if of_p is None else of_p.data_ptr(),
            *self.where(a),
        )
        return of_a, of_p
