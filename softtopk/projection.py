"""relu(x W^T + c) . w2, a hidden layer that nobody keeps: the estimator of k of a sparse autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softtopk import dispatch
from softtopk.backends.reference import compute_dtype
from softtopk.functional import FLOATS


def relu_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    w2: Tensor,
    *,
    copy: Tensor | torch.dtype | None = None,
    squares: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """relu(x weight^T + bias) . w2 for every row of x, differentiable in all four.

    The hidden layer (B, n) is never stored: it is made a chunk of columns at a time, and the backward has a
    bit for each of its elements.

    Args:
        x: (..., d) of a float dtype.
        weight: (n, d).
        bias: (n,).
        w2: (n,).
        copy: the weight rounded to another dtype, as mixed precision keeps it beside float32 master weights:
            the products are in that dtype, to which x and bias are rounded, and are added up in float32;
            the gradients go to `weight`. Or only that dtype: the weight is rounded to it a chunk at a time,
            forward and backward, and nothing of its size is kept. Without it the products are in weight's
            dtype.
        squares: (n,), contiguous and in the dtype of the result: the backward writes into it the sum of
            squares of each row of weight's gradient, for a clip that need not read that again
            (`optim.clip_factor`).
        backend: as in `soft_topk`.

    Returns:
        (...) in float32, or in float64 where the products are. The gradients are in the dtypes of the
        arguments; they have no derivatives of their own.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend.
        TypeError: an argument that is no tensor of floats.
        softtopk.BackendUnavailable: the backend cannot run here; the message says why.

    >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    >>> relu_projection(x, weight, bias=torch.tensor([0.5, 0.0]), w2=torch.tensor([2.0, 1.0]))
    tensor([3.])
    """
    check(x=x, weight=weight, bias=bias, w2=w2, copy=copy, squares=squares)
    dtype = products_dtype(weight, copy)
    used = (copy if isinstance(copy, Tensor) else weight).detach()
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    arguments = rows, weight, bias, w2, used, dtype, squares, backend
    return ReluProjection.apply(*arguments).view(x.shape[:-1])


class ReluProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, w2, used, dtype, squares, backend):
        kernels = dispatch.kernels(backend, x.device)
        ctx.backend, ctx.squares = backend, squares
        ctx.dtypes = (x.dtype, weight.dtype, bias.dtype, w2.dtype)
        arguments = [x.to(dtype).contiguous(), used.contiguous(), bias.to(dtype).contiguous()]
        arguments.append(w2.to(compute_dtype(dtype)).contiguous())
        scores, mask = kernels.relu_projection_forward(*arguments)
        ctx.save_for_backward(mask, *arguments)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        mask, x, weight, bias, w2 = ctx.saved_tensors
        kernels = dispatch.kernels(ctx.backend, x.device)
        of_x, *of_weights = ctx.dtypes
        # What the backends can write: the products' dtype or the one they are added up in.
        dtype = x.dtype if of_weights[0] == x.dtype else w2.dtype
        to_weight, to_bias, to_w2, to_x = kernels.relu_projection_backward(
            g, mask, x, weight, bias, w2, dtype, ctx.needs_input_grad[0], ctx.squares
        )
        gradients = (t.to(like) for t, like in zip((to_weight, to_bias, to_w2), of_weights, strict=True))
        return None if to_x is None else to_x.to(of_x), *gradients, None, None, None, None


def products_dtype(weight: Tensor, copy: Tensor | torch.dtype | None) -> torch.dtype:
    if isinstance(copy, torch.dtype):
        return copy
    return weight.dtype if copy is None else copy.dtype


def check(**tensors: Tensor | torch.dtype | None) -> None:
    """Raise as `relu_projection` says."""
    dtype = tensors["copy"] if isinstance(tensors["copy"], torch.dtype) else None
    if dtype is not None:
        if dtype not in FLOATS:
            raise TypeError(f"copy={dtype}; it must be one of {FLOATS}")
        tensors["copy"] = None
    for name, tensor in tensors.items():
        if tensor is None and name in ("copy", "squares"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be one of {FLOATS}")
        if tensor.device != tensors["x"].device:
            raise ValueError(f"{name} is on {tensor.device}, x on {tensors['x'].device}")
    x, weight = tensors["x"], tensors["weight"]
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (..., d) and (n, d)")
    n = len(weight)
    for name, shape in (("bias", (n,)), ("w2", (n,)), ("copy", weight.shape), ("squares", (n,))):
        if tensors[name] is not None and tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; weight asks for {tuple(shape)}")
    squares = tensors["squares"]
    wanted = compute_dtype(dtype or products_dtype(weight, tensors["copy"]))
    if squares is not None and not (squares.dtype == wanted and squares.is_contiguous()):
        raise ValueError(f"squares must be contiguous and of {wanted}")
