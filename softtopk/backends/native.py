"""What the cpu and cuda backends share: the native module, and its arguments made from tensors.

The four functions of a backend differ only in where they run, so they are written once, on top of
a submodule of softtopk._C and a function that gives its last arguments (threads, or device and
stream) for a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from softtopk.backends.reference import compute_dtype

try:
    from softtopk import _C as _C
except ImportError as error:
    raise ImportError(
        "the native module softtopk._C is not there; build it with `pip install .` in the source"
        f" tree ({error})"
    ) from error

# The values of csrc/softtopk.h's Type and Form.
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
FORMS = {"p": 0, "log": 1, "log_complement": 2, "none": 3}


class Kernels:
    """The four functions of backends/reference.py on one submodule of softtopk._C."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where

    def soft_topk_forward(
        self, x: Tensor, k: float | Tensor, alpha: float | Tensor, largest: bool = True, form: str = "p"
    ) -> tuple[Tensor | None, Tensor]:
        x = unit_stride(x)
        out = None if form == "none" else x.new_empty(x.shape)
        solution = x.new_empty((x.shape[0], 5), dtype=compute_dtype(x.dtype))
        self.launchers.soft_topk_forward(
            rows(x, largest),
            per_row(k),
            per_row(alpha),
            FORMS[form],
            0 if out is None else out.data_ptr(),
            solution.data_ptr(),
            *self.where(x),
        )
        return out, solution

    def soft_topk_backward(
        self,
        x: Tensor,
        solution: Tensor,
        alpha: float | Tensor,
        v: Tensor,
        largest: bool = True,
        form: str = "p",
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, v, solution = unit_stride(x), unit_stride(v), solution.contiguous()
        grad_x = x.new_empty(x.shape)
        grad_k = solution.new_empty((x.shape[0],))
        grad_alpha = torch.empty_like(grad_k)
        self.launchers.soft_topk_backward(
            rows(x, largest),
            solution.data_ptr(),
            per_row(alpha),
            FORMS[form],
            v.data_ptr(),
            v.stride(0),
            grad_x.data_ptr(),
            grad_k.data_ptr(),
            grad_alpha.data_ptr(),
            *self.where(x),
        )
        return grad_x, grad_k, grad_alpha

    def hard_topk_mask(self, x: Tensor, k: float | Tensor, largest: bool = True) -> Tensor:
        x = unit_stride(x)
        mask = x.new_empty(x.shape)
        self.launchers.hard_topk_mask(rows(x, largest), per_row(k), mask.data_ptr(), *self.where(x))
        return mask

    def hard_topk_indices(
        self, x: Tensor, k: float | Tensor, max_k: int, largest: bool = True
    ) -> tuple[Tensor, Tensor]:
        x = unit_stride(x)
        indices = x.new_empty((x.shape[0], max_k), dtype=torch.int64)
        counts = x.new_empty((x.shape[0],), dtype=torch.int64)
        self.launchers.hard_topk_indices(
            rows(x, largest),
            per_row(k),
            max_k,
            indices.data_ptr(),
            counts.data_ptr(),
            *self.where(x),
        )
        return indices, counts


def reads(x: Tensor) -> bool:
    """Whether a 2-D x is read as it lies: contiguous rows, whatever the stride from row to row."""
    return x.stride(1) == 1 or x.shape[1] == 1


def unit_stride(x: Tensor) -> Tensor:
    return x if reads(x) else x.contiguous()


def rows(x: Tensor, largest: bool) -> tuple[int, int, int, int, int, bool]:
    return x.data_ptr(), TYPES[x.dtype], x.shape[0], x.shape[1], x.stride(0), largest


def per_row(value: float | Tensor) -> tuple[int, int, int, float]:
    """A number, or a float32 or float64 tensor (rows,) of any stride."""
    if isinstance(value, Tensor):
        return value.data_ptr(), TYPES[value.dtype], value.stride(0), 0.0
    return 0, 0, 0, value
