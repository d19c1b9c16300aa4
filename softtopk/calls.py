"""The operators as the public functions call them: k and alpha are a tensor or a number each, and a call
goes past the dispatcher where direct.py allows it."""

from __future__ import annotations

import torch
from torch import Tensor

from softtopk import direct, ops
from softtopk.ops import requires_grad


def split(value: Tensor | float) -> tuple[Tensor | None, float]:
    """(tensor, 0) or (None, number)."""
    return (value, 0.0) if isinstance(value, Tensor) else (None, value)


def soft_topk(x, k, alpha, largest, form, backend, solved):
    """(y, solution); without `solved` the solution may be None."""
    kernels = direct.kernels(backend, x, k, alpha)
    if kernels is None:
        return ops.soft_topk_op(x, *split(k), *split(alpha), largest, form, backend)
    if torch.is_grad_enabled() and (requires_grad(x) or requires_grad(k) or requires_grad(alpha)):
        return ops.DirectSoftTopK.apply(kernels, x, *split(k), *split(alpha), largest, form, backend)
    if solved:
        return ops.solve(kernels, x, *split(k), *split(alpha), largest, form)
    if form == "hard":
        return kernels.hard_topk_mask(x, k, largest), None
    return kernels.soft_topk_forward(x, k, alpha, largest, form, False)


def mask(x, k, largest, backend):
    kernels = direct.kernels(backend, x, k)
    if kernels is None:
        return ops.mask_op(x, *split(k), largest, backend)
    return kernels.hard_topk_mask(x, k, largest)


def selected(x, k, max_k, largest, backend):
    """(values, indices, counts); where the values need a gradient, or are not the kernels', they are None."""
    kernels = direct.kernels(backend, x, k)
    if kernels is None:
        return None, *ops.indices_op(x, *split(k), max_k, largest, backend)
    fetched = not (torch.is_grad_enabled() and x.requires_grad)
    return kernels.hard_topk_selected(x, k, max_k, largest, fetched)
