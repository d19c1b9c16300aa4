"""The registered operators, their fake kernels, and the autograd around them.

Schemas take 2-D x (rows, n); k and alpha are 1-D tensors of one value per row or, when the
tensor is None, the number beside it. The public functions of functional.py bring any call to
this form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtopk import dispatch
from softtopk.backends.reference import compute_dtype

library = torch.library.Library("softtopk", "DEF")
PER_ROW = "Tensor? k, float k_number, Tensor? alpha, float alpha_number"


def register(schema: str):
    """Register a function for every device under `softtopk::`; the backend argument selects the kernel."""
    name = schema.split("(")[0]
    library.define(schema)

    def decorate(function):
        library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.softtopk, name).default

    return decorate


def either(tensor: Tensor | None, number: float) -> Tensor | float:
    return number if tensor is None else tensor


@register(f"soft_topk_forward(Tensor x, {PER_ROW}, bool largest, str backend) -> (Tensor, Tensor)")
def forward_op(x, k, k_number, alpha, alpha_number, largest, backend):
    kernels = dispatch.module(backend)
    return kernels.soft_topk_forward(x, either(k, k_number), either(alpha, alpha_number), largest)


@torch.library.register_fake("softtopk::soft_topk_forward", lib=library)
def _(x, k, k_number, alpha, alpha_number, largest, backend):
    solution = x.new_empty((x.shape[0], 5), dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape), solution


@register(
    "soft_topk_backward(Tensor x, Tensor solution, Tensor? alpha, float alpha_number, Tensor v,"
    " bool largest, str backend) -> (Tensor, Tensor, Tensor)"
)
def backward_op(x, solution, alpha, alpha_number, v, largest, backend):
    kernels = dispatch.module(backend)
    return kernels.soft_topk_backward(x, solution, either(alpha, alpha_number), v, largest)


@torch.library.register_fake("softtopk::soft_topk_backward", lib=library)
def _(x, solution, alpha, alpha_number, v, largest, backend):
    rows = solution.new_empty((x.shape[0],))
    return x.new_empty(x.shape), rows, torch.empty_like(rows)


@register("hard_topk_mask(Tensor x, Tensor? k, float k_number, bool largest, str backend) -> Tensor")
def mask_op(x, k, k_number, largest, backend):
    return dispatch.module(backend).hard_topk_mask(x, either(k, k_number), largest)


@torch.library.register_fake("softtopk::hard_topk_mask", lib=library)
def _(x, k, k_number, largest, backend):
    return x.new_empty(x.shape)


@register(
    "hard_topk_indices(Tensor x, Tensor? k, float k_number, int max_k, bool largest, str backend)"
    " -> (Tensor, Tensor)"
)
def indices_op(x, k, k_number, max_k, largest, backend):
    return dispatch.module(backend).hard_topk_indices(x, either(k, k_number), max_k, largest)


@torch.library.register_fake("softtopk::hard_topk_indices", lib=library)
def _(x, k, k_number, max_k, largest, backend):
    return (
        x.new_empty((x.shape[0], max_k), dtype=torch.int64),
        x.new_empty((x.shape[0],), dtype=torch.int64),
    )


class SoftTopKFunction(torch.autograd.Function):
    """(x, k, alpha) -> (p, solution). x is 2-D; k and alpha are numbers or (rows,) tensors.

    With hard=True the first output is the hard mask and the gradients are those of p (straight-through).
    """

    @staticmethod
    def forward(ctx, x, k, alpha, largest, hard, backend):
        k_tensor, k_number = split(k)
        alpha_tensor, alpha_number = split(alpha)
        p, solution = forward_op(x, k_tensor, k_number, alpha_tensor, alpha_number, largest, backend)
        if hard:
            p = mask_op(x, k_tensor, k_number, largest, backend)
        ctx.save_for_backward(x, solution, alpha_tensor)
        ctx.alpha_number, ctx.largest, ctx.backend = alpha_number, largest, backend
        ctx.dtypes = tuple(t.dtype if isinstance(t, Tensor) else None for t in (k, alpha))
        ctx.mark_non_differentiable(solution)
        return p, solution

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v, _):
        x, solution, alpha = ctx.saved_tensors
        grad_x, grad_k, grad_alpha = backward_op(
            x, solution, alpha, ctx.alpha_number, v, ctx.largest, ctx.backend
        )
        needs = ctx.needs_input_grad
        k_dtype, alpha_dtype = ctx.dtypes
        return (
            grad_x if needs[0] else None,
            grad_k.to(k_dtype) if needs[1] else None,
            grad_alpha.to(alpha_dtype) if needs[2] else None,
            None,
            None,
            None,
        )


def split(value: Tensor | float) -> tuple[Tensor | None, float]:
    return (value, 0.0) if isinstance(value, Tensor) else (None, value)
