"""The operator in plain PyTorch: the mathematics on one page, and the oracle of every test.

Soft top-k (LapSum, Struski et al., ICML 2025, arXiv 2503.06242) of a row x with budget k and
scale alpha is p_i = F((x_i - b) / alpha), where F is the CDF of the Laplace distribution,

    F(t) = exp(t) / 2  for t <= 0,    F(t) = 1 - exp(-t) / 2  for t > 0,

and the threshold b is the one root of sum_i F((x_i - b) / alpha) = k.

Split the row at b: A = {x_i >= b}, B = {x_i < b}. Then sum(p) - k = D - H_A + H_B with
D = |A| - k, H_A = sum of h over A, H_B = sum of h over B, h_i = exp(-|x_i - b| / alpha) / 2.
Relative to the last element above, r_A = min A, and the first below, r_B = max B, with
P = sum_A exp(-(x - r_A) / alpha) and Q = sum_B exp((x - r_B) / alpha), the product
H_A H_B = P Q exp(-(r_A - r_B) / alpha) / 4 does not depend on b, so with H_A - H_B = D

    R = sqrt(D^2 + P Q exp(-(r_A - r_B) / alpha)),   H_A = (R + D) / 2,   H_B = (R - D) / 2,

and h_i = H_A exp(-(x_i - r_A) / alpha) / P above, H_B exp((x_i - r_B) / alpha) / Q below.
So (r_A, r_B, P, Q, D), the *solution*, describes the row: b itself is never needed, which is
as well, because in a gap many alpha wide a rounded b has lost what the gradients depend on.

The log domain has the logarithm of w, where w is p or 1 - p. On the *minor* side of the threshold
(B for p, A for 1 - p) w = h, whose logarithm is linear in x and holds where h underflows; on the
*major* side w = 1 - h.

Every backend implements the four functions at the end of this file with the same signatures.
`form` is "p", "log" for log p, "log_complement" for log(1 - p) or, where only the solution is
wanted, "none": then None is returned in the place of an output. They take 2-D x of any strides and
k and alpha as Python numbers or 1-D tensors of one value per row, and they modify nothing. Here all
is computed in float64 for float64 x, in float32 otherwise, but for the log domain always in
float64; differences are taken before they are scaled, and nothing is reassociated.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from softtopk.backends.projection import relu_projection_backward as relu_projection_backward
from softtopk.backends.projection import relu_projection_forward as relu_projection_forward


class Solution(NamedTuple):
    """What describes a solved row; each (rows, 1). Stored as one (rows, 5) tensor.

    Conventions: an empty A has r_A = +inf and P = 0, an empty B has r_B = -inf and Q = 0;
    P = Q = 0 marks a row whose k was clamped (no gradient); all NaN marks a NaN row.
    """

    r_A: Tensor
    r_B: Tensor
    P: Tensor
    Q: Tensor
    D: Tensor


class Densities(NamedTuple):
    """The solution as factors: h = (H_A / P) e above and (H_B / Q) e below, q = h / R. (rows, 1)."""

    R: Tensor  # sum of h
    h_A: Tensor  # H_A / P
    h_B: Tensor  # H_B / Q
    q_A: Tensor  # (H_A / R) / P, also where R underflows
    q_B: Tensor  # (H_B / R) / Q


class LogDensities(NamedTuple):
    """The same for the log domain, in float64: log h = log_h_A + log e above, log_h_B + log e below."""

    R: Tensor
    w_A: Tensor  # H_A / R and H_B / R, also where R underflows
    w_B: Tensor
    log_h_A: Tensor
    log_h_B: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column(value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A number or a (rows,) tensor as a (rows, 1) tensor of the given dtype on x's device."""
    if isinstance(value, Tensor):
        return value.to(dtype).unsqueeze(1)
    return torch.full((x.shape[0], 1), value, dtype=dtype, device=x.device)


def reads(x: Tensor) -> bool:
    """Whether a 2-D x is read as it lies: here whatever its strides."""
    return True


def scale_column(alpha: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """alpha as `column` gives it, rounded by `rounded_scale`."""
    return rounded_scale(column(alpha, x, torch.float64), dtype)


def rounded_scale(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 alpha in a dtype: a positive finite one does not round to 0 or to infinity."""
    info = torch.finfo(dtype)
    within = exact.clamp(info.tiny * info.eps, info.max)
    return torch.where((exact > 0) & exact.isfinite(), within, exact).to(dtype)


def signed(x: Tensor, largest: bool) -> Tensor:
    """x or -x, contiguous, so that the order of every sum follows the indices whatever the strides."""
    return (x if largest else -x).contiguous()


def solve(x: Tensor, k: Tensor, alpha: Tensor) -> Solution:
    """The solution of each row of x (rows, n) in the compute dtype; k is (rows, 1) float64."""
    n = x.shape[1]
    finite = x.isfinite()
    plus = (x == torch.inf).sum(1, keepdim=True)
    minus = (x == -torch.inf).sum(1, keepdim=True)
    clamped = torch.minimum(torch.maximum(k, plus.double()), (n - minus).double())

    # |A| by bisection over the sorted row: an element v is in A where S(v) <= k. S(v) - k is
    # summed as D - P/2 + Q/2, so that its error is relative to the slope of S, not to k.
    ranked = x.sort(1, descending=True).values
    low, high = plus, n - minus
    for _ in range(n.bit_length()):
        middle = (low + high) // 2
        v = ranked.gather(1, middle.clamp(max=n - 1))
        above = x >= v
        tail = torch.where(finite, torch.exp(-(x - v).abs() / alpha), 0)
        excess = (above.sum(1, keepdim=True) - clamped).to(x.dtype) - 0.5 * (
            torch.where(above, tail, -tail).sum(1, keepdim=True)
        )
        inside = (excess <= 0) & (middle < high)
        low = torch.where(inside, middle + 1, low)
        high = torch.where(inside, high, torch.maximum(middle, low))
    count = low

    A, B = count > plus, count < n - minus  # not empty
    r_A = torch.where(A, ranked.gather(1, (count - 1).clamp(min=0)), torch.inf)
    r_B = torch.where(B, ranked.gather(1, count.clamp(max=n - 1)), -torch.inf)
    e = tails(x, r_A, r_B, alpha)
    upper = x >= r_A
    P = torch.where(upper, e, 0).sum(1, keepdim=True)
    Q = torch.where(upper, 0, e).sum(1, keepdim=True)
    D = (count - clamped).to(x.dtype)

    free = clamped == k
    bad = x.isnan().any(1, keepdim=True) | k.isnan() | ~((alpha > 0) & alpha.isfinite())
    solution = Solution(r_A, r_B, torch.where(free, P, 0), torch.where(free, Q, 0), D)
    return Solution(*(torch.where(bad, torch.nan, s) for s in solution))


def tails(x: Tensor, r_A: Tensor, r_B: Tensor, alpha: Tensor) -> Tensor:
    """exp(-|x - r| / alpha) with each element's own reference; 0 for an infinite element."""
    return torch.exp(-distances(x, r_A, r_B) / alpha)


def distances(x: Tensor, r_A: Tensor, r_B: Tensor) -> Tensor:
    """|x - r| with each element's own reference; infinite for an infinite element."""
    return torch.where(x.isinf(), torch.inf, torch.where(x >= r_A, x - r_A, r_B - x))


def densities(solution: Solution, alpha: Tensor) -> Densities:
    """The factors of h and q. The masses w = H / R come first: at D = 0 they are 1/2 exactly, however
    small R is, and the smaller one is taken in its conjugate form, without cancellation."""
    r_A, r_B, P, Q, D = solution
    coupling = P.sqrt() * Q.sqrt() * torch.exp(-(r_A - r_B) / alpha / 2)
    R = torch.hypot(D, coupling)
    larger = (1 + D.abs() / R) / 2
    smaller = (coupling / R) * (coupling / (R + D.abs())) / 2
    # R = 0: D = 0 and the coupling underflowed or one side is empty; the masses at the limit.
    both = torch.where((P > 0) & (Q > 0), 0.5, 1.0).to(P.dtype)
    w_A = torch.where(R == 0, both * (P > 0), torch.where(D >= 0, larger, smaller))
    w_B = torch.where(R == 0, both * (Q > 0), torch.where(D >= 0, smaller, larger))
    q_A, q_B = safe_divide(w_A, P), safe_divide(w_B, Q)
    return Densities(R, q_A * R, q_B * R, q_A, q_B)


def log_densities(solution: Solution, alpha: Tensor) -> LogDensities:
    """`densities` by way of logarithms, which do not underflow, from a solution in float64."""
    r_A, r_B, P, Q, D = solution
    log_P, log_Q, log_D = P.log(), Q.log(), D.abs().log()
    half_gap = torch.where((P > 0) & (Q > 0), (r_A - r_B) / alpha / 2, torch.inf)
    log_coupling = (log_P + log_Q) / 2 - half_gap
    log_R = torch.logaddexp(2 * log_D, 2 * log_coupling) / 2
    ratio = torch.exp(log_D - log_R)  # |D| / R
    larger = torch.log1p(ratio) - math.log(2)
    smaller = 2 * (log_coupling - log_R) - torch.log1p(ratio) - math.log(2)
    # As in `densities`, at R = 0.
    both = torch.where((P > 0) & (Q > 0), -math.log(2), 0.0)
    larger = torch.where(log_R == -torch.inf, both, larger)
    smaller = torch.where(log_R == -torch.inf, both, smaller)
    log_w_A = torch.where(P == 0, -torch.inf, torch.where(D >= 0, larger, smaller))
    log_w_B = torch.where(Q == 0, -torch.inf, torch.where(D >= 0, smaller, larger))
    log_h_A = torch.where(P == 0, -torch.inf, log_w_A + log_R - log_P)
    log_h_B = torch.where(Q == 0, -torch.inf, log_w_B + log_R - log_Q)
    return LogDensities(log_R.exp(), log_w_A.exp(), log_w_B.exp(), log_h_A, log_h_B)


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / b)


def soft_topk_forward(
    x: Tensor, k: float | Tensor, alpha: float | Tensor, largest: bool = True, form: str = "p"
) -> tuple[Tensor | None, Tensor]:
    """What `form` names, (rows, n) in x's dtype, and the solution (rows, 5) in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    scale = scale_column(alpha, x, dtype)
    values = signed(x.to(dtype), largest)
    solution = solve(values, column(k, x, torch.float64), scale)
    stored = torch.cat(solution, 1)
    if form == "none":
        return None, stored
    if form != "p":
        return log_forward(*in_float64(values, solution, scale), form).to(x.dtype), stored
    factors = densities(solution, scale)
    above = values >= solution.r_A
    h = torch.where(above, factors.h_A, factors.h_B) * tails(values, solution.r_A, solution.r_B, scale)
    return torch.where(above, 1 - h, h).to(x.dtype), stored


def in_float64(x: Tensor, row: Solution, alpha: Tensor) -> tuple[Tensor, Solution, Tensor]:
    return x.double(), Solution(*(s.double() for s in row)), alpha.double()


def log_forward(x: Tensor, row: Solution, alpha: Tensor, form: str) -> Tensor:
    """log p or log(1 - p); all in float64."""
    factors = log_densities(row, alpha)
    above = x >= row.r_A
    log_h = torch.where(above, factors.log_h_A, factors.log_h_B) - distances(x, row.r_A, row.r_B) / alpha
    return torch.where(above == (form == "log_complement"), log_h, torch.log1p(-log_h.exp()))


def soft_topk_backward(
    x: Tensor,
    solution: Tensor,
    alpha: float | Tensor,
    v: Tensor,
    largest: bool = True,
    form: str = "p",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <p, v>, or of <log p, v> or <log(1 - p), v>: to x (rows, n) in x's dtype, to k and
    alpha (rows,) in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    scale = scale_column(alpha, x, dtype)
    values = signed(x.to(dtype), largest)
    row = Solution(*solution.split(1, dim=1))
    if form == "p":
        gradients = p_backward(values, row, scale, v.to(dtype).contiguous())
    else:
        gradients = log_backward(*in_float64(values, row, scale), v.double().contiguous(), form)
    grad_x, grad_k, grad_alpha = gradients
    grad_x = (grad_x if largest else -grad_x).to(x.dtype)
    return grad_x, grad_k.squeeze(1).to(dtype), grad_alpha.squeeze(1).to(dtype)


def p_backward(x: Tensor, row: Solution, alpha: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x = s (v - <q, v>), grad_k = <q, v>, grad_alpha = -sum s (t - <q, t>) v with s = h / alpha
    and t = (x - b) / alpha. Both v and t are taken relative to their values at the element of the
    largest q: otherwise one dominant element cancels everything. An element with q = 0 is skipped,
    so that neither its v nor its t, which may be infinite or NaN, can spread.
    """
    factors = densities(row, alpha)
    above = x >= row.r_A
    e = tails(x, row.r_A, row.r_B, alpha)
    q = torch.where(above, factors.q_A, factors.q_B) * e
    h = torch.where(above, factors.h_A, factors.h_B) * e

    pivot = q.argmax(1, keepdim=True)
    v_pivot = v.gather(1, pivot)
    dv = torch.where(q == 0, 0, v - v_pivot)
    dt = torch.where(q == 0, 0, (x - x.gather(1, pivot)) / alpha)
    mean_v = (q * dv).sum(1, keepdim=True)
    mean_t = (q * dt).sum(1, keepdim=True)

    grad_x = torch.where(h == 0, 0, h * (dv - mean_v) / alpha)  # h / alpha itself may overflow
    bound = (row.P == 0) & (row.Q == 0)  # k outside its range, or no finite element
    grad_k = torch.where(bound, 0, v_pivot + mean_v)
    covariance = (q * (dt - mean_t) * (dv - mean_v)).sum(1, keepdim=True)
    return grad_x, grad_k, torch.where(factors.R == 0, 0, -factors.R * covariance / alpha)


def log_backward(
    x: Tensor, row: Solution, alpha: Tensor, v: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """With g = v on the minor side and h / (1 - h) v on the major side, both negated for log(1 - p),

        grad_x = (g - q sum(g)) / alpha,   grad_k = sum(g) / R,   grad_alpha = -sum g (t - <q, t>) / alpha.

    sum(g) = V + R M, with V the sum of v over the minor side and M = sum q u over the major side,
    u = v / (1 - h): so grad_k = V / R + M holds where R underflows. grad_x is v - q V - h M on the
    minor side, h (u - M) - q V on the major one. What a dominant element would cancel is summed
    without it: on the major side u is taken relative to the element of the largest q; on the minor
    side, where q > 3/4, v - q V = v sum' q - q sum' v over the other elements. Omitted are infinite
    elements, those of the major side with q = 0, and rows whose k was clamped.
    """
    factors = log_densities(row, alpha)
    above = x >= row.r_A
    on_minor = above == (form == "log_complement")
    e = tails(x, row.r_A, row.r_B, alpha)
    q = torch.where(above, safe_divide(factors.w_A, row.P), safe_divide(factors.w_B, row.Q)) * e
    h = torch.where(above, factors.log_h_A, factors.log_h_B).exp() * e
    minor = on_minor & x.isfinite() & ((row.P > 0) | (row.Q > 0))
    major = ~on_minor & (q > 0)
    w_major, w_minor = factors.w_A, factors.w_B
    if form == "log_complement":
        w_major, w_minor = w_minor, w_major

    pivot = q.argmax(1, keepdim=True)
    u = torch.where(major, v / (1 - h), 0)
    u_pivot = u.gather(1, pivot)  # 0 where the pivot is on the minor side
    du = torch.where(major, u - u_pivot, 0)
    mean_u = (q * du).sum(1, keepdim=True)
    M = u_pivot * w_major + mean_u
    on_rest = q <= 0.75
    rest_q = torch.where(on_rest, q, 0).sum(1, keepdim=True)
    rest_v = torch.where(on_rest & minor, v, 0).sum(1, keepdim=True)
    V = rest_v + torch.where(~on_rest & minor, v, 0).sum(1, keepdim=True)

    centred = torch.where(on_rest, v - q * V, v * rest_q - q * rest_v) - h * M
    on_major = h * (du + (u_pivot * w_minor - mean_u)) - q * V
    grad_x = torch.where(minor, torch.where(q == 0, v, centred), torch.where(major, on_major, 0)) / alpha
    grad_k = torch.where(V == 0, 0, V / factors.R) + M
    g = torch.where(minor, v, h * u)
    dt = torch.where(minor | major, (x - x.gather(1, pivot)) / alpha, 0)
    grad_alpha = -(g * (dt - (q * dt).sum(1, keepdim=True))).sum(1, keepdim=True) / alpha
    sign = -1 if form == "log_complement" else 1
    return tuple(torch.where(row.D.isnan(), torch.nan, sign * g) for g in (grad_x, grad_k, grad_alpha))


def hard_topk_mask(x: Tensor, k: float | Tensor, largest: bool = True) -> Tensor:
    """1 for the round-half-up(k) largest of each row, the lowest index first among equals; 0 elsewhere."""
    values = signed(x, largest)
    rank = values.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    mask = (rank < hard_budget(values, k)).to(x.dtype)
    return torch.where(bad_rows(values, k), torch.nan, mask)


def hard_topk_indices(
    x: Tensor, k: float | Tensor, max_k: int, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """The same elements, at most max_k of a row: indices (rows, max_k) int64, ascending, then -1; counts
    (rows,) int64."""
    values = signed(x, largest)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :max_k]
    counts = hard_budget(values, k).clamp(max=max_k)
    counts = torch.where(bad_rows(values, k), 0, counts)
    kept = torch.arange(max_k, device=x.device) < counts
    order = torch.nn.functional.pad(order, (0, max_k - order.shape[1]))
    ascending = torch.where(kept, order, x.shape[1]).sort(1).values
    return torch.where(kept, ascending, -1), counts.squeeze(1)


def hard_budget(x: Tensor, k: float | Tensor) -> Tensor:
    """round-half-up(k) clamped to [#(+inf), n - #(-inf)], (rows, 1) int64; a NaN k counts as 0."""
    plus = (x == torch.inf).sum(1, keepdim=True)
    minus = (x == -torch.inf).sum(1, keepdim=True)
    n = x.shape[1]
    rounded = (column(k, x, torch.float64) + 0.5).floor().nan_to_num(0).clamp(0, n).long()
    return torch.minimum(torch.maximum(rounded, plus), n - minus)


def bad_rows(x: Tensor, k: float | Tensor) -> Tensor:
    """(rows, 1) bool: a NaN in x or k."""
    return x.isnan().any(1, keepdim=True) | column(k, x, torch.float64).isnan()
