"""The accuracy bars: how far a backend's result lies from the float64 oracle, in units of its bar.

A ratio of 1 is the bar. The oracle is the reference backend in float64, which test_oracle.py
anchors to 60-digit arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from softtopk.backends import reference

LOG_FORMS = ("log", "log_complement")
FORMS = ("p", *LOG_FORMS)


@dataclass
class Result:
    """p (or log p, log(1 - p)), the solution and the gradients of <p, v>, all float64 on the CPU."""

    p: Tensor
    solution: Tensor
    grad_x: Tensor
    grad_k: Tensor
    grad_alpha: Tensor


@dataclass
class Oracle(Result):
    """The float64 result, and h = min(p, 1 - p), of which p does not hold what lies above the threshold."""

    h: Tensor


def run(backend: ModuleType, x: Tensor, k, alpha, v: Tensor, largest: bool = True, form: str = "p") -> Result:
    """One forward and backward of a backend on 2-D x."""
    p, solution = backend.soft_topk_forward(x, k, alpha, largest, form)
    gradients = backend.soft_topk_backward(x, solution, alpha, v, largest, form)
    return Result(*(t.detach().cpu().double() for t in (p, solution, *gradients)))


def oracle(x: Tensor, k, alpha, v: Tensor, largest: bool = True, form: str = "p") -> Oracle:
    """The same in float64 by the reference."""
    k, alpha = (t.double().cpu() if isinstance(t, Tensor) else t for t in (k, alpha))
    x = x.double().cpu()
    want = run(reference, x, k, alpha, v.double().cpu(), largest, form)
    row, scale = reference.Solution(*want.solution.split(1, 1)), reference.column(alpha, x, torch.float64)
    values = reference.signed(x, largest)
    factors = reference.densities(row, scale)
    h = torch.where(values >= row.r_A, factors.h_A, factors.h_B)
    return Oracle(**vars(want), h=h * reference.tails(values, row.r_A, row.r_B, scale))


def ratios(got: Result, want: Oracle, k, alpha, v: Tensor, form: str = "p") -> dict[str, float]:
    """Worst ratio of each error to its bar for float32 input; NaN counts as infinite.

    k and alpha are numbers or (rows,) tensors.
    """
    rows = v.shape[0]
    v = v.double().cpu()
    alpha = torch.as_tensor(alpha, dtype=torch.float64).cpu().expand(rows)
    v_max = v.abs().amax(1)
    floor = 1e-30 * v_max / alpha
    grad_x_bar = 1e-5 * torch.maximum(want.grad_x.abs().amax(1), floor)
    if form == "p":
        k = torch.as_tensor(k, dtype=torch.float64).cpu().expand(rows)
        weight = alpha_weight(want, alpha, v)
        grad_k_bar = 1e-5 * v_max
        worst = {
            "p": (got.p - want.p).abs().amax(1) / 1e-6,
            "sum": (got.p.sum(1) - k).abs() / (2e-6 * k.clamp(min=1)),
        }
    else:
        weight, weight_k = log_weights(want, alpha, v)
        grad_k_bar = 1e-5 * torch.maximum(v_max, weight_k)
        worst = {"log": relative_error(got.p, want.p).amax(1) / 1e-5}
    alpha_bar = torch.where(weight > floor, 1e-4 * weight, torch.inf)
    worst |= {
        "grad_x": difference(got.grad_x, want.grad_x).amax(1) / grad_x_bar,
        "grad_k": difference(got.grad_k, want.grad_k) / grad_k_bar,
        "grad_alpha": difference(got.grad_alpha, want.grad_alpha) / alpha_bar,
    }
    return {name: r.nan_to_num(torch.inf, posinf=torch.inf).max().item() for name, r in worst.items()}


def difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want|, and 0 where they are the same in float32, an infinity for what overflows there."""
    return torch.where(got.float() == want.float(), 0, (got - want).abs())


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| / |want| where |want| >= 1e-20; of the smaller ones only that they are small."""
    small = want.abs() < 1e-20
    error = torch.where(small, torch.where(got.abs() < 1e-19, 0, torch.inf), difference(got, want))
    return error / torch.where(small, 1, want.abs())


def alpha_weight(want: Oracle, alpha: Tensor, v: Tensor) -> Tensor:
    """sum_i s_i (1 + |t_i|) |v_i|, the scale of grad_alpha; s = h / alpha and |t| = -log(2 h)."""
    t = torch.where(want.h > 0, -(2 * want.h.clamp(min=1e-300)).log(), 0).clamp(min=0)
    return (want.h / alpha.unsqueeze(1) * (1 + t) * v.abs()).sum(1)


def log_weights(want: Result, alpha: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i |g_i| (1 + |t_i|) / alpha, the scale of grad_alpha, and sum_i |g_i| / R, that of grad_k.

    From w = p or 1 - p, whose logarithm is given: h = w and g = v on the minor side, w <= 1/2;
    h = 1 - w and g = h / w v on the major side, which adds at most 2 max|v| to the second and is left
    out there. |t| = -log(2 h).
    """
    minor = want.p <= -math.log(2)
    log_h = torch.where(minor, want.p, (-torch.expm1(want.p)).log())
    g = torch.where(want.p == -torch.inf, 0, torch.where(minor, 1, torch.exp(log_h - want.p)) * v.abs())
    t = torch.where(g == 0, 0, -log_h - math.log(2)).clamp(min=0)
    on_minor = torch.where(minor, g, 0).sum(1)
    scale_k = torch.where(on_minor == 0, 0, on_minor / log_h.exp().sum(1))
    return (g * (1 + t)).sum(1) / alpha, scale_k


def units_in_last_place(got: Tensor, want: Tensor) -> Tensor:
    """Distance in representable values of got's half dtype from the rounded float64 result; all of one
    sign, or 0."""
    rounded = want.to(got.dtype)
    distance = (got.abs().view(torch.int16).int() - rounded.abs().view(torch.int16).int()).abs()
    return torch.where(want.abs() < 2.0**-126, 0, distance)
