"""The checks of the sparse path's arguments, in the manner of functional.py: raised before any work."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from softtopk.backends.reference import compute_dtype
from softtopk.functional import FLOATS, Rows


def matrix(name: str, x: Tensor, backend: str | None) -> Tensor:
    """x (..., n), checked, as (rows, n)."""
    Rows(x, -1, backend, name)
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def float_tensor(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor, of: str) -> None:
    """Raise unless `value` is a float tensor of the shape on the device of x, which is called `of`; a None
    in the shape is any length."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {value.dtype}; float16, bfloat16, float32 or float64 is needed")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, {of} on {x.device}")
    fits = value.dim() == len(shape) and all(s in (None, t) for s, t in zip(shape, value.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} has shape {tuple(value.shape)}; ({wanted}) is needed")


def check_threshold(threshold: float | Tensor, n: int, x: Tensor, of: str) -> float | Tensor:
    """A number >= 0 as a float, or a float32 tensor (n,)."""
    if isinstance(threshold, Tensor):
        float_tensor("threshold", threshold, (n,), x, of)
        if threshold.dtype != torch.float32:
            raise TypeError(f"threshold has dtype {threshold.dtype}; float32 is needed")
        return threshold.detach().contiguous()
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(f"threshold must be a number or a tensor, not {type(threshold).__name__}")
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold} must be >= 0 and finite")
    return float(threshold)


def check_room(max_active: int) -> int:
    if isinstance(max_active, bool) or not isinstance(max_active, int) or max_active < 1:
        raise ValueError(f"max_active={max_active!r} must be an integer >= 1")
    return max_active


def check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False")


def check_selection_gradient(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"selection_gradient must be a number, not {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"selection_gradient={scale} must be finite")
    return float(scale)


def room(k: float | Tensor, max_active: int | None, n: int, check: bool) -> int:
    """C: max_active or, by default, a quarter more than the largest budget and 32, in whole 32s."""
    if max_active is not None:
        return check_room(max_active)
    if isinstance(k, Tensor):
        if not check:
            raise ValueError("max_active=None: give max_active when k is a tensor and check=False")
        k = float(k.detach().nan_to_num(0).clamp(0, n).max()) if k.numel() else 0.0
    return 32 * math.ceil(1.25 * k / 32) + 32


def check_copy(copy: Tensor | torch.dtype | None, weight: Tensor, x: Tensor, of: str) -> None:
    """Raise unless the copy, if there is one, is of the weight's shape, and float64 if the weight is."""
    if copy is None:
        return
    if isinstance(copy, torch.dtype):
        if copy not in FLOATS:
            raise TypeError(f"copy={copy}; float16, bfloat16, float32 or float64 is needed")
        dtype = copy
    else:
        float_tensor("copy", copy, tuple(weight.shape), x, of)
        dtype = copy.dtype
    if compute_dtype(dtype) != compute_dtype(weight.dtype):
        raise TypeError(f"copy has dtype {dtype}, weight {weight.dtype}: one of them is float64")
    if isinstance(copy, Tensor) and copy.requires_grad:
        raise ValueError("copy requires a gradient, which goes to weight; detach it")


def check_squares(squares: Tensor | None, n: int, x: Tensor, of: str) -> None:
    if squares is None:
        return
    float_tensor("squares", squares, (n,), x, of)
    if squares.dtype != torch.float32:
        raise TypeError(f"squares has dtype {squares.dtype}; float32 is needed")


def check_decoder(
    x: Tensor,
    of: str,
    n: int,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    copy: Tensor | torch.dtype | None,
    squares: Tensor | None,
) -> None:
    """Raise unless the parameters of a decoder fit codes of n latents with the dtype and device of x."""
    float_tensor("weight", weight, (n, None), x, of)
    if compute_dtype(weight.dtype) != compute_dtype(x.dtype):
        raise TypeError(f"weight has dtype {weight.dtype}, {of} {x.dtype}: one of them is float64")
    if bias is not None:
        float_tensor(bias_name, bias, (weight.shape[1],), x, of)
    check_copy(copy, weight, x, of)
    check_squares(squares, n, x, of)
