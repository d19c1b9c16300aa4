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

Every backend implements the four functions at the end of this file with the same signatures.
They take 2-D x of any strides and k and alpha as Python numbers or 1-D tensors of one value
per row, and they modify nothing. Here all is computed in float64 for float64 x, in float32
otherwise; differences are taken before they are scaled, and nothing is reassociated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    distance = torch.where(x >= r_A, x - r_A, r_B - x)
    return torch.where(x.isinf(), 0, torch.exp(-distance / alpha))


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


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / b)


def soft_topk_forward(
    x: Tensor, k: float | Tensor, alpha: float | Tensor, largest: bool = True, form: str = "p"
) -> tuple[Tensor, Tensor]:
    """p (rows, n) in x's dtype, and the solution (rows, 5) in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    scale = column(alpha, x, dtype)
    values = signed(x.to(dtype), largest)
    solution = solve(values, column(k, x, torch.float64), scale)
    factors = densities(solution, scale)
    above = values >= solution.r_A
    h = torch.where(above, factors.h_A, factors.h_B) * tails(values, solution.r_A, solution.r_B, scale)
    p = torch.where(above, 1 - h, h)
    return p.to(x.dtype), torch.cat(solution, 1)


def soft_topk_backward(
    x: Tensor, solution: Tensor, alpha: float | Tensor, v: Tensor, largest: bool = True, form: str = "p"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <p, v>: to x (rows, n) in x's dtype, to k and alpha (rows,) in the compute dtype.

    grad_x = s (v - <q, v>), grad_k = <q, v>, grad_alpha = -sum s (t - <q, t>) v with s = h / alpha
    and t = (x - b) / alpha. Both v and t are taken relative to their values at the element of the
    largest q: otherwise one dominant element cancels everything. An element with q = 0 is skipped,
    so that neither its v nor its t, which may be infinite or NaN, can spread.
    """
    dtype = compute_dtype(x.dtype)
    scale = column(alpha, x, dtype)
    values = signed(x.to(dtype), largest)
    v = v.to(dtype).contiguous()
    row = Solution(*solution.split(1, dim=1))
    factors = densities(row, scale)
    above = values >= row.r_A
    e = tails(values, row.r_A, row.r_B, scale)
    q = torch.where(above, factors.q_A, factors.q_B) * e
    s = torch.where(above, factors.h_A, factors.h_B) * e / scale

    pivot = q.argmax(1, keepdim=True)
    v_pivot = v.gather(1, pivot)
    dv = torch.where(q == 0, 0, v - v_pivot)
    dt = torch.where(q == 0, 0, (values - values.gather(1, pivot)) / scale)
    mean_v = (q * dv).sum(1, keepdim=True)
    mean_t = (q * dt).sum(1, keepdim=True)

    grad_x = torch.where(s == 0, 0, s * (dv - mean_v))
    bound = (row.P == 0) & (row.Q == 0)  # k outside its range, or no finite element
    grad_k = torch.where(bound, 0, v_pivot + mean_v)
    covariance = (q * (dt - mean_t) * (dv - mean_v)).sum(1, keepdim=True)
    grad_alpha = torch.where(factors.R == 0, 0, -factors.R / scale * covariance)
    return (grad_x if largest else -grad_x).to(x.dtype), grad_k.squeeze(1), grad_alpha.squeeze(1)


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
