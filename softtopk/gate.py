"""Activations times their gates, of which small ones count as 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softtopk import dispatch
from softtopk.functional import FLOATS


def gated(a: Tensor, p: Tensor, cut: float = 0.0, *, rectified: bool = False) -> Tensor:
    """a * p, with 0 in place of a p of at most `cut`; a, p of one shape and dtype. p may be overwritten.

    The gradient of p is that of a * p for all of it. rectified: a is relu(z) as a value but has z's gradient,
    as after an in-place ReLU that autograd was not told of; what is 0 then gets none.
    """
    return Gated.apply(a, p, float(cut), rectified)


def rectify(z: Tensor) -> Tensor:
    """z, made relu(z) behind autograd's back: for `gated` with `rectified`, and for nothing else that has a
    gradient. z must not be what autograd has kept of its own computation."""
    with torch.no_grad():
        torch.relu_(z)
    return z


class Gated(torch.autograd.Function):
    """On a GPU csrc/cuda/gate.cu: a pass over a and p, and one over them and the gradient."""

    @staticmethod
    def forward(ctx, a, p, cut, rectified):
        ctx.kernels = dispatch.module("cuda").gates if fits(a, p) else None
        ctx.cut, ctx.rectified = cut, rectified
        ctx.save_for_backward(a, p)
        if ctx.kernels is not None:
            return ctx.kernels.forward(a, p, cut)
        torch.threshold_(p, cut, 0.0)
        return a * p

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (a, p), want_p = ctx.saved_tensors, ctx.needs_input_grad[1]
        if ctx.kernels is not None:
            g = g.contiguous()
            g = g if g.data_ptr() % 16 == 0 else g.clone()
            return *ctx.kernels.backward(a, p, g, ctx.cut, ctx.rectified, want_p), None, None
        of_a = g * p
        if ctx.rectified:
            of_a.masked_fill_(a <= 0, 0)
        return of_a, g * a if want_p else None, None, None


def fits(a: Tensor, p: Tensor) -> bool:
    """Whether the CUDA backend's kernels take them."""
    if not (a.is_cuda and a.dtype == p.dtype and a.dtype in FLOATS and a.shape == p.shape):
        return False
    whole = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (a, p))
    return whole and dispatch.module("cuda") is not None
