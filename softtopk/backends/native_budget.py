"""What softtopk/budget.py does on csrc/cuda/budget.cu: contiguous float32 tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor


class BudgetKernels:
    """`where` gives the device and the stream of a tensor."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where

    def forward(self, score: Tensor, shift: Tensor, scale: float, low: float, high: float) -> Tensor:
        k = torch.empty_like(score)
        self.launchers.budget_forward(
            score.data_ptr(), shift.data_ptr(), scale, low, high, score.numel(), k.data_ptr(), *self.where(k)
        )
        return k

    def backward(
        self, score: Tensor, shift: Tensor, scale: float, low: float, high: float, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of score and shift."""
        of_score, of_shift = torch.empty_like(score), torch.empty_like(shift)
        self.launchers.budget_backward(
            score.data_ptr(),
            shift.data_ptr(),
            scale,
            low,
            high,
            g.data_ptr(),
            score.numel(),
            of_score.data_ptr(),
            of_shift.data_ptr(),
            *self.where(g),
        )
        return of_score, of_shift

    def excess(self, k: Tensor, target: float | Tensor, beta: float) -> Tensor:
        """(2,): the loss, and the gradient of it to each of k."""
        out = k.new_empty(2)
        by_tensor = isinstance(target, Tensor)
        self.launchers.budget_excess(
            k.data_ptr(),
            k.numel(),
            target.data_ptr() if by_tensor else 0,
            0.0 if by_tensor else target,
            beta,
            out.data_ptr(),
            *self.where(k),
        )
        return out
