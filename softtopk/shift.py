"""Rows with a vector taken from each: what a step does to its input before the first product."""

from __future__ import annotations

import torch
from torch import Tensor

from softtopk import dispatch
from softtopk.optim import natively

SHORT = (torch.float32, torch.bfloat16, torch.float16)


def shifted(
    x: Tensor, shift: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - shift) / scale of x (..., d), a shift and a scale (d,), rounded to a dtype; None is that of the
    result.

    On a GPU in one pass, where no gradient is wanted, shift and scale are float32 and the dtypes of at most
    32 bits.
    """
    vectors = (shift,) if scale is None else (shift, scale)
    if fits(x, *vectors) and dtype in (None, *SHORT):
        return dispatch.module("cuda").shifts.rows(x, shift, scale, dtype or torch.float32)
    out = x - shift if scale is None else (x - shift) / scale
    return out if dtype is None else out.to(dtype)


def fits(x: Tensor, *vectors: Tensor) -> bool:
    """Whether the CUDA backend's kernel takes them."""
    if not (x.is_cuda and x.dtype in SHORT and x.is_contiguous() and x.dim() > 0):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *vectors)):
        return False
    return all(v.shape == x.shape[-1:] for v in vectors) and natively(*vectors)
