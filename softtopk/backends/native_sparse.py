"""The sparse path of the cpu and cuda backends: the functions of backends/reference_sparse.py on a submodule
of softtopk._C, their arguments made from tensors as in native.py."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from softtopk.backends.native import TYPES, per_row, rows, unit_stride
from softtopk.backends.reference import compute_dtype

# The values of csrc/softtopk.h's Selecting.
MODES = {"soft": 0, "straight_through": 1, "hard": 2}


class SparseKernels:
    """`where` gives the last arguments of a launcher for a tensor: threads, or device and stream."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where

    def code_forward(
        self,
        pre: Tensor,
        k: float | Tensor,
        alpha: float | Tensor | None,
        bias: Tensor | None,
        threshold: float | Tensor,
        mode: str,
        max_active: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        pre = unit_stride(pre)
        size, dtype = (len(pre), max_active), compute_dtype(pre.dtype)
        values, active = (pre.new_empty(size, dtype=dtype) for _ in range(2))
        indices = pre.new_empty(size, dtype=torch.int32)
        counts = pre.new_empty(len(pre), dtype=torch.int32)
        state = None if mode == "hard" else pre.new_empty((len(pre), 7), dtype=dtype)
        bias = None if bias is None else bias.contiguous()
        thresholds = threshold.contiguous() if isinstance(threshold, Tensor) else None
        size = self.launchers.select_workspace(*pre.shape, TYPES[pre.dtype])
        workspace = pre.new_empty(size, dtype=torch.uint8)
        self.launchers.code_forward(
            *rows(pre, True),
            *per_row(k),
            *per_row(0.0 if alpha is None else alpha),
            address(bias),
            address(thresholds),
            0.0 if thresholds is not None else threshold,
            MODES[mode],
            values.data_ptr(),
            indices.data_ptr(),
            active.data_ptr(),
            counts.data_ptr(),
            address(state),
            max_active,
            workspace.data_ptr(),
            *self.where(pre),
        )
        return values, indices, active, counts, state

    def code_backward(
        self,
        active: Tensor,
        values: Tensor | None,
        counts: Tensor,
        state: Tensor,
        alpha: float | Tensor,
        g: Tensor,
        selection_gradient: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        active, counts, state, g = (t.contiguous() for t in (active, counts, state, g))
        values = None if values is None else values.contiguous()
        grad_active = torch.empty_like(active)
        grad_k, grad_alpha = (active.new_empty(len(active)) for _ in range(2))
        self.launchers.code_backward(
            TYPES[active.dtype],
            *active.shape,
            active.data_ptr(),
            address(values),
            counts.data_ptr(),
            state.data_ptr(),
            *per_row(alpha),
            g.data_ptr(),
            float(selection_gradient),
            grad_active.data_ptr(),
            grad_k.data_ptr(),
            grad_alpha.data_ptr(),
            *self.where(active),
        )
        return grad_active, grad_k, grad_alpha

    def transpose(self, indices: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
        indices, counts = indices.contiguous(), counts.contiguous()
        size = self.launchers.transpose_workspace(*indices.shape, n)
        workspace = indices.new_empty(size, dtype=torch.uint8)
        offsets, entries = indices.new_empty(n + 1), indices.new_empty(indices.numel())
        self.launchers.transpose(
            indices.data_ptr(),
            counts.data_ptr(),
            *indices.shape,
            n,
            offsets.data_ptr(),
            entries.data_ptr(),
            workspace.data_ptr(),
            *self.where(indices),
        )
        return offsets, entries

    def decode(
        self, values: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        values, indices, counts, weight = (t.contiguous() for t in (values, indices, counts, weight))
        bias = None if bias is None else bias.contiguous()
        out = weight.new_empty(len(values), weight.shape[1])
        self.launchers.decode(
            values.data_ptr(),
            indices.data_ptr(),
            counts.data_ptr(),
            *values.shape,
            weight.data_ptr(),
            TYPES[weight.dtype],
            *weight.shape,
            address(bias),
            out.data_ptr(),
            *self.where(weight),
        )
        return out

    def latent_gradients(
        self,
        scale: Tensor,
        indices: Tensor,
        offsets: Tensor,
        entries: Tensor,
        y: Tensor,
        weight: Tensor | None,
        out_dtype: torch.dtype,
        want_sums: bool,
        want_squares: bool,
        project: bool = False,
        zero_silent: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        given = (scale, indices, offsets, entries, y)
        scale, indices, offsets, entries, y = (t.contiguous() for t in given)
        weight = None if weight is None else weight.contiguous()
        n, d = len(offsets) - 1, y.shape[1]
        grad = y.new_empty(n, d, dtype=out_dtype)
        dots = None if weight is None else torch.empty_like(scale)
        sums = scale.new_empty(n) if want_sums else None
        squares = scale.new_empty(n) if want_squares else None
        room = self.launchers.gradients_workspace(
            TYPES[y.dtype], *scale.shape, n, d, dots is not None, squares is not None
        )
        workspace = y.new_empty(room, dtype=torch.uint8)
        self.launchers.latent_gradients(
            scale.data_ptr(),
            indices.data_ptr(),
            offsets.data_ptr(),
            entries.data_ptr(),
            *scale.shape,
            n,
            d,
            y.data_ptr(),
            address(weight),
            TYPES[y.dtype],
            TYPES[out_dtype],
            project,
            zero_silent,
            grad.data_ptr(),
            address(dots),
            address(sums),
            address(squares),
            workspace.data_ptr(),
            *self.where(y),
        )
        return grad, dots, sums, squares


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
