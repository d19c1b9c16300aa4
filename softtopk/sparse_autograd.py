"""The autograd rules of the sparse path, for reverse mode: selection, selection after an encoder, decoder."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from softtopk.sparse_code import Transposition, scattered


class Selecting(NamedTuple):
    """What a selection needs besides pre, bias, k and alpha."""

    kernels: Any  # of the backend: backends/reference_sparse.py
    mode: str  # "soft", "straight_through" or "hard"
    threshold: float | Tensor
    max_active: int
    check: bool
    selection_gradient: float
    transposition: Transposition  # of the code


class Weighting(NamedTuple):
    """What becomes of a weight's gradient."""

    kernels: Any
    project: bool
    squares: Tensor | None
    sparse: bool
    transposition: Transposition


def untraced(function: Callable) -> Callable:
    """The function, which torch.compile does not trace but runs as it is, with all that it calls."""
    disabled = None

    @functools.wraps(function)
    def call(*arguments, **options):
        nonlocal disabled
        # torch.compiler.disable imports the compiler, which takes a second.
        if disabled is None and "torch._dynamo" in sys.modules:
            disabled = torch.compiler.disable(function)
        return (disabled or function)(*arguments, **options)

    return call


class Once(Function):
    """A rule of reverse mode alone, whose gradients cannot be differentiated again."""

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("softtopk: sparse codes have no forward-mode derivatives")


class NoSecondDerivative(Function):
    """The identity, whose gradient is an error."""

    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("softtopk: sparse codes have no second derivatives")


def once(backward: Callable) -> Callable:
    """The backward of a rule, whose results raise where they are differentiated. (With once_differentiable
    they would be constants wherever the incoming gradient is one.)"""

    @functools.wraps(backward)
    def first(ctx, *gradients):
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        return tuple(None if t is None else NoSecondDerivative.apply(t.requires_grad_()) for t in results)

    return first


class Select(Once):
    """(pre, bias, k, alpha) -> values, indices, counts; the gradient of pre is dense."""

    @staticmethod
    def forward(ctx, pre, bias, k, alpha, how: Selecting):
        given = None if bias is None else bias.detach().to(pre.dtype)
        values, indices, active, counts, state = select(pre, given, k, alpha, how)
        keep(ctx, k, alpha, how, values, indices, active, counts, state)
        ctx.shape, ctx.dtype = pre.shape, pre.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return values, indices, counts

    @staticmethod
    @once
    def backward(ctx, g, *_):
        grad_active, grad_k, grad_alpha = of_active(ctx, g)
        to_pre, to_bias, *_ = ctx.needs_input_grad
        grad_pre = grad_bias = None
        if to_pre or to_bias:
            indices = ctx.saved_tensors[1]
            grad_pre = scattered(grad_active.to(ctx.dtype), indices, ctx.shape[1])
        if to_bias:
            grad_bias = grad_pre.sum(0, dtype=grad_active.dtype).to(ctx.bias_dtype)
        return grad_pre if to_pre else None, grad_bias, grad_k, grad_alpha, None


class Encode(Once):
    """(x, weight, bias, k, alpha) -> the code of x weight^T + bias; nothing of its size in the backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, k, alpha, used: Tensor, how: Selecting, of_weight: Weighting):
        given = None if bias is None else bias.detach().to(used.dtype)
        pre = torch.nn.functional.linear(x, used, given)
        values, indices, active, counts, state = select(pre, None, k, alpha, how)
        to_x = ctx.needs_input_grad[0]
        keep(ctx, k, alpha, how, values, indices, active, counts, state, x, used if to_x else None)
        ctx.dtype, ctx.of_weight = weight.dtype, of_weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        return values, indices, counts

    @staticmethod
    @once
    def backward(ctx, g, *_):
        grad_active, grad_k, grad_alpha = of_active(ctx, g)
        _, indices, counts, *_, x, used = ctx.saved_tensors
        to_x, to_weight, to_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if to_weight or to_bias:
            grad_weight, _, sums = weight_gradient(
                ctx.of_weight, indices, counts, grad_active, x, None, ctx.dtype, to_bias
            )
            grad_bias = sums.to(ctx.bias_dtype) if to_bias else None
        if to_x:
            grad_x = ctx.how.kernels.decode(grad_active, indices, counts, used, None)
        grad_weight = grad_weight if to_weight else None
        return grad_x, grad_weight, grad_bias, grad_k, grad_alpha, None, None, None


class Decode(Once):
    """(values, weight, bias) -> sum_j values_j weight[indices_j] + bias."""

    @staticmethod
    def forward(ctx, values, weight, bias, used, indices, counts, how: Weighting):
        given = None if bias is None else bias.detach().to(used.dtype)
        ctx.save_for_backward(values, indices, counts, used)
        ctx.how, ctx.dtype = how, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return how.kernels.decode(values, indices, counts, used, given)

    @staticmethod
    @once
    def backward(ctx, g):
        values, indices, counts, used = ctx.saved_tensors
        to_values, to_weight, to_bias, *_ = ctx.needs_input_grad
        grad_values = grad_weight = grad_bias = None
        if to_values or to_weight:  # both come out of one pass
            rows = used if to_values or ctx.how.project else None
            grad_weight, grad_values, _ = weight_gradient(
                ctx.how, indices, counts, values, g, rows, ctx.dtype, False
            )
        if to_bias:
            grad_bias = g.sum(0, dtype=values.dtype).to(ctx.bias_dtype)
        return (
            grad_values if to_values else None,
            grad_weight if to_weight else None,
            grad_bias,
            *(None,) * 4,
        )


def select(pre: Tensor, bias: Tensor | None, k, alpha, how: Selecting) -> tuple[Tensor | None, ...]:
    """values, indices, active, counts, state of a backend; where the code is to be checked, with room."""
    pre = pre if pre.stride(1) == 1 else pre.contiguous()
    forward = how.kernels.code_forward
    code = forward(pre, k, alpha, bias, how.threshold, how.mode, how.max_active)
    if how.check and len(pre):
        most = int(code[3].max())
        if most > how.max_active:
            code = forward(pre, k, alpha, bias, how.threshold, how.mode, -(-most // 32) * 32)
    return code


def keep(ctx, k, alpha, how, values, indices, active, counts, state, *more) -> None:
    """What `of_active` needs, and more."""
    mask = values if how.mode == "straight_through" else None
    tensor = alpha if isinstance(alpha, Tensor) else None
    ctx.save_for_backward(active, indices, counts, mask, state, tensor, *more)
    ctx.how, ctx.alpha = how, None if tensor is not None else alpha
    ctx.k_dtype = k.dtype if isinstance(k, Tensor) else None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices, counts)


def of_active(ctx, g: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient of a code's values those of its activations, k and alpha."""
    active, _, counts, mask, state, alpha, *_ = ctx.saved_tensors
    how = ctx.how
    g = torch.zeros_like(active) if g is None else g.contiguous()
    if how.mode == "hard":
        return g, None, None  # what unused places hold is not read
    scale = ctx.alpha if alpha is None else alpha
    grad_active, grad_k, grad_alpha = how.kernels.code_backward(
        active, mask, counts, state, scale, g, how.selection_gradient
    )
    to_k = None if ctx.k_dtype is None else grad_k.to(ctx.k_dtype)
    return grad_active, to_k, None if alpha is None else grad_alpha.to(alpha.dtype)


def weight_gradient(
    how: Weighting,
    indices: Tensor,
    counts: Tensor,
    scale: Tensor,
    y: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    want_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of a weight (n, d) in a dtype, dots and sums of `latent_gradients`; fills the squares."""
    grad, dots, sums, squares = how.kernels.latent_gradients(
        scale,
        indices,
        *how.transposition(indices, counts),
        y.contiguous(),
        weight,
        dtype if dtype == y.dtype else scale.dtype,  # kernels write no third dtype
        want_sums,
        how.squares is not None,
        project=how.project,
        zero_silent=not how.sparse,
    )
    if squares is not None:
        how.squares.copy_(squares)
    return grad.to(dtype), dots, sums
