"""What the cpu and cuda backends share: the native module, and its arguments made from tensors.

The four functions of a backend differ only in where they run, so they are written once, on top of
a submodule of softtopk._C and a function that gives its last arguments (threads, or device and
stream) for a tensor. They take more than the backends' contract has: where x (..., n) is contiguous
it may be of any rank, and the results are of that shape (softtopk/direct.py).
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
    """The four functions of backends/reference.py on one submodule of softtopk._C.

    `log_needs_solution`: the log domain has a place for the solution even where nobody reads it.
    """

    def __init__(
        self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]], log_needs_solution: bool
    ):
        self.launchers, self.where, self.log_needs_solution = launchers, where, log_needs_solution

    def soft_topk_forward(
        self,
        x: Tensor,
        k: float | Tensor,
        alpha: float | Tensor,
        largest: bool = True,
        form: str = "p",
        solved: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Without `solved` the solution may be None."""
        x = unit_stride(x)
        out = None if form == "none" else torch.empty_like(x)
        solved = solved or (self.log_needs_solution and form != "p")
        solution = per_row_result(x, 5) if solved else None
        self.launchers.soft_topk_forward(
            *rows(x, largest),
            *per_row(k),
            *per_row(alpha),
            FORMS[form],
            0 if out is None else out.data_ptr(),
            0 if solution is None else solution.data_ptr(),
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
        grad_x, grad_k, grad_alpha = torch.empty_like(x), per_row_result(x), per_row_result(x)
        self.launchers.soft_topk_backward(
            *rows(x, largest),
            solution.data_ptr(),
            *per_row(alpha),
            FORMS[form],
            v.data_ptr(),
            v.shape[-1] if v.is_contiguous() else v.stride(0),
            grad_x.data_ptr(),
            grad_k.data_ptr(),
            grad_alpha.data_ptr(),
            *self.where(x),
        )
        return grad_x, grad_k, grad_alpha

    def hard_topk_mask(self, x: Tensor, k: float | Tensor, largest: bool = True) -> Tensor:
        x = unit_stride(x)
        mask = torch.empty_like(x)
        self.launchers.hard_topk_mask(*rows(x, largest), *per_row(k), mask.data_ptr(), *self.where(x))
        return mask

    def hard_topk_indices(
        self, x: Tensor, k: float | Tensor, max_k: int, largest: bool = True
    ) -> tuple[Tensor, Tensor]:
        return self.hard_topk_selected(x, k, max_k, largest, False)[1:]

    def hard_topk_selected(
        self, x: Tensor, k: float | Tensor, max_k: int, largest: bool = True, fetched: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """(values, indices, counts), values (..., max_k) in x's dtype; without `fetched` they are None."""
        x = unit_stride(x)
        values = per_row_result(x, max_k, dtype=x.dtype) if fetched else None
        indices = per_row_result(x, max_k, dtype=torch.int64)
        counts = per_row_result(x, dtype=torch.int64)
        self.launchers.hard_topk_indices(
            *rows(x, largest),
            *per_row(k),
            max_k,
            indices.data_ptr(),
            0 if values is None else values.data_ptr(),
            counts.data_ptr(),
            *self.where(x),
        )
        return values, indices, counts


def reads(x: Tensor) -> bool:
    """Whether a 2-D x is read as it lies: contiguous rows, whatever the stride from row to row."""
    return x.stride(1) == 1 or x.shape[1] == 1


def unit_stride(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or (x.dim() == 2 and reads(x)) else x.contiguous()


def rows(x: Tensor, largest: bool) -> tuple[int, int, int, int, int, bool]:
    n = x.shape[-1]
    if n and x.is_contiguous():
        return x.data_ptr(), TYPES[x.dtype], x.numel() // n, n, n, largest
    return x.data_ptr(), TYPES[x.dtype], x.shape[0], n, x.stride(0), largest


def per_row(value: float | Tensor) -> tuple[int, int, int, float]:
    """A number, or a float32 or float64 tensor: (rows,) of any stride, or as direct.strides_fit says."""
    if isinstance(value, Tensor):
        stride = value.stride(0) if value.dim() == 1 else int(value.is_contiguous())
        return value.data_ptr(), TYPES[value.dtype], stride, 0.0
    return 0, 0, 0, value


def per_row_result(x: Tensor, *more: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result (..., *more) for the rows of x, in the compute dtype."""
    shape = (*x.shape[:-1], *more)
    if dtype is None and x.dtype != torch.float32:
        dtype = compute_dtype(x.dtype)
    # Sizes one by one, and a dtype only where it is another: half the time of the other spelling.
    if shape:
        return x.new_empty(*shape) if dtype is None else x.new_empty(*shape, dtype=dtype)
    return x.new_empty((), dtype=dtype)
