"""The mean squared error of rows: what a reconstruction is trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softtopk import dispatch
from softtopk.optim import natively

SHORT = (torch.float32, torch.bfloat16, torch.float16)


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """mean_b |y - x|^2, (), of x and y (B, d), differentiable.

    On a GPU in a pass over both, and in another for the gradient of y, for a constant x in float32 and y of
    at most 32 bits; nothing of their size is kept.
    """
    if fits(x, y):
        return SquaredError.apply(x, y)
    return (y - x).pow(2).sum(1).mean()


class SquaredError(torch.autograd.Function):
    """On csrc/cuda/squared_error.cu."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return dispatch.module("cuda").errors.forward(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return None, dispatch.module("cuda").errors.backward(*ctx.saved_tensors, g.contiguous())


def fits(x: Tensor, y: Tensor) -> bool:
    """Whether the CUDA backend's kernels take them."""
    if x.requires_grad or not (y.is_cuda and y.dtype in SHORT and y.shape == x.shape and y.dim() == 2):
        return False
    return y.is_contiguous() and y.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0 and natively(x)
