"""The public functions: argument checks, broadcasting, and what the arguments mean."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.compiler import is_compiling

from softtopk import calls, direct

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def soft_topk(
    x: Tensor,
    k: float | Tensor,
    alpha: float | Tensor = 0.1,
    *,
    dim: int = -1,
    largest: bool = True,
    hard: bool = False,
    return_threshold: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Differentiable top-k: a weight in [0, 1] for every element, summing to k along `dim`.

    .. math::  p_i = F((x_i - b) / \alpha), \qquad \sum_i p_i = k

    with F the CDF of the Laplace distribution and b the unique threshold that meets the budget
    (LapSum, Struski et al., ICML 2025, arXiv 2503.06242). alpha -> 0 gives the hard top-k mask,
    alpha -> infinity gives k/n everywhere.

    Args:
        x: float16, bfloat16, float32 or float64 of any shape and strides. -inf masks an element
            (p = 0), +inf takes one unit of k (p = 1); neither gets a gradient.
        k: the budget, 0 <= k <= n, not necessarily an integer: a number, or a tensor that
            broadcasts to x's shape without `dim`, one value per row. Float tensors get a gradient.
            Tensor values out of range are clamped and get a gradient of 0.
        alpha: the scale, > 0, in the units of x: the transition is about 3 alpha wide on each
            side of b. A number or a tensor like k; float tensors get a gradient.
        dim: the dimension that is selected from.
        largest: False selects the smallest elements: the operator applied to -x.
        hard: the result is the hard top-k mask (`hard_topk`), the gradients are the soft ones.
        return_threshold: also return b, in the compute dtype and without gradient, of x's shape
            without `dim`; +inf where k is 0, -inf where k is n (negated for largest=False).
        backend: "cuda", "triton", "cpu" or "reference"; None takes SOFTTOPK_BACKEND or, without
            it, the fastest that is there for x's device (`available_backends`).

    Returns:
        p of x's shape and dtype, and b if asked for. Computed in float64 for float64 x, in float32
        for all others; k and alpha are never rounded to x's dtype. A row with a NaN in x, k or
        alpha, or with alpha <= 0 or infinite in a tensor, is NaN; other rows are not touched.

    p is differentiable twice in reverse and forward mode, and works under torch.func, torch.compile and
    torch.export; no call waits for the device.

    Raises:
        ValueError: k or alpha out of range as a number, n = 0, shapes or devices that do not fit,
            an unknown backend.
        TypeError: x, k or alpha of another type or dtype.
        IndexError: dim out of range.
        softtopk.BackendUnavailable: the backend cannot run here; the message says why.

    >>> soft_topk(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2)
    tensor([1.0000e+00, 3.3690e-03, 9.9663e-01, 1.5295e-07])
    """
    if not (type(largest) is type(hard) is type(return_threshold) is bool):
        refuse_flags(largest=largest, hard=hard, return_threshold=return_threshold)
    # The commonest call needs no more than this.
    if not (hard or return_threshold or backend is not None or is_compiling()):
        p = direct.soft_topk(x, k, alpha, dim, largest)
        if p is not None:
            return p
    rows = Rows(x, dim, backend)
    k, alpha = rows.budget(k), rows.scale(alpha)
    form = "hard" if hard else "p"
    p, solution = calls.soft_topk(rows.x, k, alpha, largest, form, backend, return_threshold)
    p = rows.restore(p)
    return (p, threshold(solution, alpha, largest)) if return_threshold else p


def log_soft_topk(
    x: Tensor,
    k: float | Tensor,
    alpha: float | Tensor = 0.1,
    *,
    dim: int = -1,
    largest: bool = True,
    complement: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""log p of `soft_topk` or, with `complement`, log(1 - p), exact where p itself is 0 or 1.

    .. math::  \log p_i = t_i - \log 2 \;(t_i \le 0), \quad \log(1 - e^{-t_i} / 2) \;(t_i > 0),
               \qquad t_i = (x_i - b) / \alpha

    and log(1 - p) with -t in place of t (LapSum, arXiv 2503.06242). log(soft_topk(x)) is -inf for nearly
    every element once alpha is small; this is linear in x there, and so has a gradient.

    Args:
        x, k, alpha, dim, largest, backend: as in `soft_topk`. A masked element (-inf) has p = 0, log p =
            -inf and no gradient; +inf has p = 1.
        complement: log(1 - p) in place of log p.

    Returns:
        Of x's shape and dtype, at most 0, with gradients to x, k and alpha; float16 is -inf below -65504.
        The gradient to k may be huge where k is an integer and alpha small against the gap of x there:
        that is its true value, and it is infinite where that is beyond the dtype's range.

    Raises:
        As `soft_topk`.

    >>> log_soft_topk(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2)
    tensor([-1.5295e-07, -5.6931e+00, -3.3747e-03, -1.5693e+01])
    """
    if not (type(largest) is type(complement) is bool):
        refuse_flags(largest=largest, complement=complement)
    rows = Rows(x, dim, backend)
    k, alpha = rows.budget(k), rows.scale(alpha)
    form = "log_complement" if complement else "log"
    y, _ = calls.soft_topk(rows.x, k, alpha, largest, form, backend, False)
    return rows.restore(y)


def hard_topk(
    x: Tensor,
    k: float | Tensor,
    *,
    dim: int = -1,
    largest: bool = True,
    max_k: int | None = None,
    return_indices: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The limit of `soft_topk` as alpha -> 0: the round-half-up(k) largest elements along `dim`.

    Ties go to the lowest index. As in `soft_topk`, k as a tensor is clamped so that every +inf is
    selected and no -inf is, and `largest=False` selects the smallest.

    Args:
        x, dim, largest, backend: as in `soft_topk`.
        k: 0 <= k <= n: a number, or a tensor that broadcasts to x's shape without `dim`.
        max_k: with return_indices, the length of the result along `dim`. It defaults to
            round-half-up(k) for a number and must be given for a tensor, so that nothing has to
            wait for the device. A row with a larger budget is cut to its max_k largest.
        return_indices: return (values, indices, counts) in place of the mask.

    Returns:
        A mask of 0 and 1 of x's shape and dtype, without gradient; or, with return_indices, the
        values (x's dtype, differentiable in x), their indices along `dim` (int64, ascending), both
        of length max_k along `dim`, and the counts (int64, x's shape without `dim`). Unused places
        hold 0 and -1. A row with a NaN in x or k is NaN in the mask and has the count 0.

    Raises:
        As `soft_topk`; ValueError for a max_k that is missing, not an integer or negative.

    >>> hard_topk(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2)
    tensor([1., 0., 1., 0.])
    """
    if not (type(largest) is type(return_indices) is bool):
        refuse_flags(largest=largest, return_indices=return_indices)
    rows = Rows(x, dim, backend)
    budget = rows.budget(k)
    if not return_indices:
        if max_k is not None:
            raise ValueError(f"max_k={max_k!r} has a meaning only with return_indices=True")
        return rows.restore(calls.mask(rows.x, budget, largest, backend))
    if max_k is None:
        if isinstance(budget, Tensor):
            raise ValueError("max_k=None: give max_k when k is a tensor")
        max_k = math.floor(budget + 0.5)
    elif isinstance(max_k, bool) or not isinstance(max_k, int) or max_k < 0:
        raise ValueError(f"max_k={max_k!r} must be an integer >= 0")
    values, indices, counts = calls.selected(rows.x, budget, max_k, largest, backend)
    if values is None:
        values = torch.where(indices < 0, 0, rows.x.gather(-1, indices.clamp(min=0)))
    return rows.restore(values), rows.restore(indices), counts


def refuse_flags(**flags: bool):
    """Raise for the first that is not a bool."""
    name, value = next((n, v) for n, v in flags.items() if not isinstance(v, bool))
    raise TypeError(f"{name}={value!r} must be True or False")


class Rows:
    """A checked x with `dim` moved to the end, and the arguments that have one value per row of it."""

    __slots__ = "given", "dim", "name", "n", "last", "x"

    def __init__(self, x: Tensor, dim: int, backend: str | None, name: str = "x"):
        if not (backend is None or isinstance(backend, str)):
            raise TypeError(f"backend={backend!r} must be a string or None")
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {x.dtype}; float16, bfloat16, float32 or float64 is needed")
        if x.layout != torch.strided:
            raise TypeError(f"{name} has layout {x.layout}; a strided tensor is needed")
        shape = x.shape
        rank = len(shape)
        if rank == 0:
            raise ValueError(f"{name} has shape (): at least one dimension is needed")
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim={dim!r} must be an integer")
        if not -rank <= dim < rank:
            raise IndexError(f"dim={dim} is out of range for {name} of shape {tuple(shape)}")
        if shape[dim] == 0:
            raise ValueError(f"{name} of shape {tuple(shape)} has no element along dim={dim}")
        self.given, self.dim, self.name, self.n = x, dim, name, shape[dim]
        self.last = dim == -1 or dim == rank - 1
        self.x = x if self.last else x.movedim(dim, -1)  # (*shape, n)

    def budget(self, k: float | Tensor) -> float | Tensor:
        """k, checked: a float, or a tensor with a value for every row."""
        if type(k) is not float:
            k = self.argument("k", k)
        if not isinstance(k, Tensor) and not 0 <= k <= self.n:
            raise ValueError(f"k={k} must lie between 0 and {self.n}")
        return k

    def scale(self, alpha: float | Tensor) -> float | Tensor:
        """alpha, checked: a float, or a tensor with a value for every row."""
        if type(alpha) is not float:
            alpha = self.argument("alpha", alpha)
        if not isinstance(alpha, Tensor) and not 0 < alpha < math.inf:
            raise ValueError(f"alpha={alpha} must be > 0 and finite")
        return alpha

    def argument(self, name: str, value: float | Tensor) -> float | Tensor:
        """A number as a float; a tensor of a fitting shape as float32 or float64 of the rows' shape, never
        rounded to half."""
        if type(value) is int:
            return float(value)
        if isinstance(value, Tensor):
            return self.tensor(name, value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number or a tensor, not {type(value).__name__}")
        return float(value)

    def tensor(self, name: str, value: Tensor) -> Tensor:
        if value.dtype not in FLOATS + INTEGERS:
            raise TypeError(f"{name} has dtype {value.dtype}; a float or integer dtype is needed")
        if value.device != self.x.device:
            raise ValueError(f"{name} is on {value.device}, {self.name} on {self.x.device}")
        shape = self.x.shape[:-1]
        same = value.shape == shape
        try:
            fits = same or value.dim() == 0 or torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} does not broadcast to {tuple(shape)},"
                f" the shape of {self.name}, {tuple(self.given.shape)}, without dim={self.dim}"
            )
        if value.dtype != torch.float32 and value.dtype != torch.float64:
            half = value.dtype in (torch.float16, torch.bfloat16)
            value = value.to(torch.float32 if half else torch.float64)
        return value if same else value.expand(shape)

    def restore(self, last: Tensor) -> Tensor:
        """(*shape, m) back to x's order of dimensions, with m along `dim`."""
        return last if self.last else last.movedim(-1, self.dim)


def threshold(solution: Tensor, alpha: float | Tensor, largest: bool) -> Tensor:
    """b (...) from the solution (..., 5): the root, rounded to the compute dtype (backends/reference.py)."""
    r_A, r_B, P, Q, D = solution.double().unbind(-1)
    alpha = alpha.detach().double() if isinstance(alpha, Tensor) else alpha
    coupling = (P.log() + Q.log() - (r_A - r_B) / alpha) / 2  # log sqrt(P Q exp(-G))
    # H_A = (R + D) / 2 = P exp(-(r_A - b) / alpha) / 2 for D > 0, and its mirror image below.
    log_larger = torch.where(D == 0, coupling, torch.hypot(D, coupling.exp()).add(D.abs()).log())
    above = r_A + alpha * (log_larger - P.log())
    below = r_B - alpha * (log_larger - Q.log())
    middle = 0.5 * (r_A + r_B) + 0.5 * alpha * (Q.log() - P.log())
    b = torch.where(D == 0, middle, torch.where(D > 0, above, below))
    b = torch.where((D == 0) & (r_A == torch.inf), torch.inf, b)
    b = torch.where((D == 0) & (r_B == -torch.inf) & (r_A != torch.inf), -torch.inf, b)
    return (b if largest else -b).to(solution.dtype)
