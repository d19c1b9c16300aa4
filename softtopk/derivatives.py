"""Forward-mode and second derivatives of the operator, in plain PyTorch on every device.

With the notation of backends/reference.py, write y_i = phi(t_i) for the output: F(t), log F(t) or
log(1 - F(t)). Along a direction (x', k', alpha'), t_i moves by

    t'_i = ((x'_i - <q, x'>) - (t_i - <q, t>) alpha') / alpha + k' / R,      <q, u> = sum_i q_i u_i,

since the budget fixes the mean, R <q, t'> = k'; and y'_i = phi'(t_i) t'_i. Along two directions,
with sigma = +1 above the threshold and -1 below, h' = -sigma h t', and the budget gives the mean of
the second derivative of t:

    y''_i = phi''(t_i) t'_i t*_i + phi'(t_i) t''_i,
    t''_i = -(t'_i alpha* + t*_i alpha') / alpha + c,    <q, t''> = <q, sigma t' t*>.

For y = F, phi' = h = R q and phi'' = -sigma R q, where R may be far below the smallest number (k an
integer, in a gap many alpha wide): q and R t' are kept, which do not underflow, and only what is
truly divided by R is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softtopk.backends import reference
from softtopk.backends.reference import compute_dtype


class Direction(NamedTuple):
    """A direction of the arguments; None where an argument does not move."""

    x: Tensor | None  # (..., n)
    k: Tensor | None  # (...)
    alpha: Tensor | None  # (...)


class Row:
    """What the formulas need of solved rows; each (..., n) or (..., 1), in the compute dtype."""

    def __init__(self, x: Tensor, solution: Tensor, alpha: float | Tensor, largest: bool, form: str):
        dtype = compute_dtype(x.dtype)
        self.sign = 1 if largest else -1
        if not isinstance(alpha, Tensor):
            alpha = torch.full((), alpha, dtype=torch.float64, device=x.device)
        self.alpha = scale = reference.rounded_scale(alpha.double().unsqueeze(-1), dtype)
        values = x.to(dtype) * self.sign
        row = reference.Solution(*solution.split(1, -1))
        factors = reference.densities(row, scale)
        self.R = factors.R
        above = values >= row.r_A
        e = reference.tails(values, row.r_A, row.r_B, scale)
        self.q = torch.where(above, factors.q_A, factors.q_B) * e
        self.sigma = torch.where(above, 1.0, -1.0).to(dtype)
        self.finite = values.isfinite()
        self.pivot = self.q.argmax(-1, keepdim=True)
        self.t = self.centred((values - values.gather(-1, self.pivot)) / scale)
        self.log = form != "p"
        if not self.log:  # phi' / R, phi'' / R, and dy / dk
            self.first, self.second, self.per_k = self.q, -self.sigma * self.q, self.q
        else:
            h = torch.where(above, factors.h_A, factors.h_B) * e
            ours = above if form == "log_complement" else ~above  # where phi is linear
            tail = h / (1 - h)
            side = 1.0 if form == "log" else -1.0
            moves = self.finite & ~((row.P == 0) & (row.Q == 0))  # a clamped k leaves nothing to move
            self.first = torch.where(moves, side * torch.where(ours, 1.0, tail), 0.0)
            self.second = torch.where(moves & ~ours, -tail / (1 - h), 0.0)
            self.per_k = torch.where(moves, side * torch.where(ours, 1 / self.R, self.q / (1 - h)), 0.0)

    def mean(self, u: Tensor) -> Tensor:
        """<q, u> (..., 1); where q = 0, u is not looked at."""
        return torch.where(self.q == 0, 0, self.q * u).sum(-1, keepdim=True)

    def centred(self, u: Tensor) -> Tensor:
        """u - <q, u>, by way of u at the largest q, lest one element cancels the others; 0 for infinite x."""
        u = u - u.gather(-1, self.pivot)
        return torch.where(self.finite, u - self.mean(u), 0)

    def speed(self, d: Direction) -> Tensor:
        """t' for the log forms, R t' for p."""
        k = self.column(d.k)
        return self.speed_at_k(d) + (divide(k, self.R) if self.log else k)

    def speed_at_k(self, d: Direction) -> Tensor:
        """The same with the budget held."""
        moved = -self.t * self.column(d.alpha)
        if d.x is not None:
            moved = moved + self.centred(d.x.to(self.q.dtype) * self.sign)
        return moved / self.alpha * (1.0 if self.log else self.R)

    def column(self, value: Tensor | None) -> Tensor:
        return torch.zeros_like(self.R) if value is None else value.to(self.q.dtype).unsqueeze(-1)

    def over_unit(self, u: Tensor) -> Tensor:
        """u / R for p, whose speeds have a factor R too many."""
        return u if self.log else divide(u, self.R)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where a is 0, whatever b."""
    return torch.where(a == 0, 0, a / b)


def tangent(
    x: Tensor, solution: Tensor, alpha: float | Tensor, direction: Direction, largest: bool, form: str
) -> Tensor:
    """The derivative of y (..., n) along a direction, in x's dtype."""
    row = Row(x, solution, alpha, largest, form)
    at_k = skipping(row.first, row.speed_at_k(direction))
    return (at_k + skipping(row.per_k, row.column(direction.k))).to(x.dtype)


def backward_of_tangent(
    x: Tensor,
    solution: Tensor,
    alpha: float | Tensor,
    v: Tensor,
    direction: Direction,
    largest: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <v, y'> to x (..., n), k and alpha (...): the Hessian of <v, y> times the direction.

    The Hessian is symmetric, so this is also the derivative of the gradients of <v, y> along it.
    """
    row = Row(x, solution, alpha, largest, form)
    speed = row.speed(direction)
    shrink = row.column(direction.alpha) / row.alpha * (1.0 if row.log else row.R)
    v = v.to(row.q.dtype)
    if not row.log:
        v = row.centred(v)  # adding a number to v changes nothing: the sum of y is k
    weight = skipping(row.first, v)
    total = weight.sum(-1, keepdim=True) if row.log else torch.zeros_like(row.R)
    # The weight of t* in d<v, y'>, and of -alpha* / alpha.
    w = skipping(row.second, v * speed) - weight * shrink + total * row.q * (row.sigma * speed + shrink)
    of_alpha = (weight * speed).sum(-1, keepdim=True) - total * row.mean(speed)
    W = w.sum(-1, keepdim=True)
    to_x = row.sign * (w - row.q * W) / row.alpha
    to_k = divide(W, row.R)
    to_alpha = -((w * row.t).sum(-1, keepdim=True) + of_alpha) / row.alpha
    return to_x.to(x.dtype), to_k.squeeze(-1), to_alpha.squeeze(-1)


def second_tangent(
    x: Tensor,
    solution: Tensor,
    alpha: float | Tensor,
    one: Direction,
    other: Direction,
    largest: bool,
    form: str,
) -> Tensor:
    """The second derivative of y (..., n) along two directions, in x's dtype."""
    row = Row(x, solution, alpha, largest, form)
    a, b = row.speed(one), row.speed(other)
    a_alpha, b_alpha = row.column(one.alpha) / row.alpha, row.column(other.alpha) / row.alpha
    curved = skipping(row.second, a * b) + row.first * row.mean(row.sigma * a * b)
    bent = (row.mean(a) - a) * b_alpha + (row.mean(b) - b) * a_alpha
    return (row.over_unit(curved) + skipping(row.first, bent)).to(x.dtype)


def skipping(weight: Tensor, u: Tensor) -> Tensor:
    """weight * u, and 0 where the weight is, so that neither NaN nor infinity spreads from there."""
    return torch.where(weight == 0, 0, weight * u)
