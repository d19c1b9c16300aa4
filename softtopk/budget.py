"""What an estimator of k ends in: scores made budgets, and the loss that holds their mean to a target.

Formulas of a few small steps on (B,). On a GPU each takes one kernel for float32, and its gradient another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from softtopk import dispatch
from softtopk.optim import natively, number


def budget(score: Tensor, shift: Tensor, scale: float, low: float, high: float) -> Tensor:
    """clamp(scale * sigmoid(score + shift), low, high) of scores (B,) and a shift ()."""
    if natively(score, shift):
        return Budget.apply(score, shift, float(scale), float(low), float(high))
    return (scale * torch.sigmoid(score + shift)).clamp(low, high)


def excess(k: Tensor, target: float | Tensor, beta: float) -> Tensor:
    """softplus_beta(mean k - target), () of budgets k (B,) and a target, a number or a 0-d constant."""
    if natively(k) and k.numel():
        return Excess.apply(k, number(target), float(beta))
    return F.softplus(k.mean() - target, beta=beta)


class Budget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, score, shift, scale, low, high):
        ctx.save_for_backward(score, shift)
        ctx.options = scale, low, high
        return kernels().forward(score, shift, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return *kernels().backward(*ctx.saved_tensors, *ctx.options, g.contiguous()), None, None, None


class Excess(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, target, beta):
        loss, slope = kernels().excess(k, target, beta).unbind()
        ctx.save_for_backward(slope)
        ctx.shape = k.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return (g * ctx.saved_tensors[0]).expand(ctx.shape), None, None


def kernels():
    return dispatch.module("cuda").budgets
