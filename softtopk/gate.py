"""Activations times their gates, of which small ones count as 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softtopk import dispatch
from softtopk.functional import FLOATS


def gated(a: Tensor, p: Tensor, cut: float) -> Tensor:
    """a * p, with 0 in place of a p of at most `cut`; a, p of one shape and dtype. p may be overwritten.

    The gradient of p is that of a * p for all of it.
    """
    if fits(a, p):
        return Gated.apply(a, p, float(cut))
    with torch.no_grad():  # the gradient of p is not touched by what its value is set to
        torch.threshold_(p, cut, 0.0)
    return a * p


class Gated(torch.autograd.Function):
    """On csrc/cuda/gate.cu: a pass over a and p, and one over them and the gradient."""

    @staticmethod
    def forward(ctx, a, p, cut):
        ctx.save_for_backward(a, p)
        ctx.cut = cut
        return dispatch.module("cuda").gates.forward(a, p, cut)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, p = ctx.saved_tensors
        g = g.contiguous()
        g = g if g.data_ptr() % 16 == 0 else g.clone()
        return *dispatch.module("cuda").gates.backward(a, p, g, ctx.cut), None


def fits(a: Tensor, p: Tensor) -> bool:
    """Whether the CUDA backend's kernels take them."""
    if not (a.is_cuda and a.dtype == p.dtype and a.dtype in FLOATS and a.shape == p.shape):
        return False
    whole = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (a, p))
    return whole and dispatch.module("cuda") is not None
