"""The accuracy bars: how far a backend's result lies from the float64 oracle, in units of its bar.

A ratio of 1 is the bar. The oracle is the reference backend in float64, which test_oracle.py
anchors to 60-digit arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from softtopk.backends import reference


@dataclass
class Result:
    """p, the solution and the gradients of <p, v>, all float64 on the CPU, and the dtype they came in."""

    p: Tensor
    solution: Tensor
    grad_x: Tensor
    grad_k: Tensor
    grad_alpha: Tensor


def run(backend: ModuleType, x: Tensor, k, alpha, v: Tensor, largest: bool = True) -> Result:
    """One forward and backward of a backend on 2-D x."""
    p, solution = backend.soft_topk_forward(x, k, alpha, largest)
    gradients = backend.soft_topk_backward(x, solution, alpha, v, largest)
    return Result(*(t.detach().cpu().double() for t in (p, solution, *gradients)))


def oracle(x: Tensor, k, alpha, v: Tensor, largest: bool = True) -> Result:
    """The same in float64 by the reference."""
    k, alpha = (t.double().cpu() if isinstance(t, Tensor) else t for t in (k, alpha))
    return run(reference, x.double().cpu(), k, alpha, v.double().cpu(), largest)


def ratios(got: Result, want: Result, k, alpha, v: Tensor) -> dict[str, float]:
    """Worst ratio of each error to its bar for float32 input; NaN counts as infinite.

    k and alpha are numbers or (rows,) tensors.
    """
    rows = v.shape[0]
    v = v.double().cpu()
    k = torch.as_tensor(k, dtype=torch.float64).cpu().expand(rows)
    alpha = torch.as_tensor(alpha, dtype=torch.float64).cpu().expand(rows)
    v_max = v.abs().amax(1)
    floor = 1e-30 * v_max / alpha
    grad_x_bar = 1e-5 * torch.maximum(want.grad_x.abs().amax(1), floor)
    weight = alpha_weight(want, alpha, v)
    alpha_bar = torch.where(weight > floor, 1e-4 * weight, torch.inf)
    worst = {
        "p": (got.p - want.p).abs().amax(1) / 1e-6,
        "sum": (got.p.sum(1) - k).abs() / (2e-6 * k.clamp(min=1)),
        "grad_x": (got.grad_x - want.grad_x).abs().amax(1) / grad_x_bar,
        "grad_k": (got.grad_k - want.grad_k).abs() / (1e-5 * v_max),
        "grad_alpha": (got.grad_alpha - want.grad_alpha).abs() / alpha_bar,
    }
    return {name: r.nan_to_num(torch.inf, posinf=torch.inf).max().item() for name, r in worst.items()}


def alpha_weight(want: Result, alpha: Tensor, v: Tensor) -> Tensor:
    """sum_i s_i (1 + |t_i|) |v_i|, the scale of grad_alpha; s and |t| = -log(2 h) follow from p's tails."""
    h = torch.minimum(want.p, 1 - want.p).clamp(min=0)
    t = torch.where(h > 0, -(2 * h.clamp(min=1e-300)).log(), 0).clamp(min=0)
    return (h / alpha.unsqueeze(1) * (1 + t) * v.abs()).sum(1)


def units_in_last_place(got: Tensor, want: Tensor) -> Tensor:
    """Distance in representable values of got's half dtype from the rounded float64 result; p >= 0."""
    rounded = want.to(got.dtype)
    distance = (got.view(torch.int16).int() - rounded.view(torch.int16).int()).abs()
    return torch.where(want < 2.0**-126, 0, distance)
