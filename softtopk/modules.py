"""Soft top-k as a layer, with a budget and a scale that may be learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from softtopk.backends.reference import compute_dtype
from softtopk.functional import soft_topk


class SoftTopK(nn.Module):
    """`soft_topk` as a module.

    Args:
        k: the budget: a number of elements > 0 or, with `fraction`, a share of them in (0, 1].
        alpha: the scale, > 0, in the units of x or, with `relative`, in standard deviations of the row.
        dim, largest, hard, backend: as in `soft_topk`.
        fraction: k counts in units of the length n along `dim`, whatever that is.
        relative: alpha is multiplied by the standard deviation of each row's finite elements, through
            which gradients pass: the result does not change when x is scaled.
        learn_k: one k for all rows is a parameter: `log_k`, or with `fraction` the `logit_k` of the share,
            so that every value of the parameter is a valid budget. Beyond n it counts as n and
            gets no gradient.
        learn_alpha: alpha is a parameter, `log_alpha`.

    What is learned is in the state_dict, as float32; what is not is a plain attribute, `k` or `alpha`,
    and may be set between calls, as an annealed alpha is.

    Shape: x (..., n, ...) -> the same, in x's dtype.

    Raises:
        ValueError: k or alpha out of range.
        TypeError: k or alpha not a number; a tensor of budgets goes to the call, `forward`.

    >>> SoftTopK(0.25, fraction=True)(torch.tensor([3.0, 1.0, 2.0, 0.0])).sum()
    tensor(1.)
    """

    def __init__(
        self,
        k: float,
        alpha: float = 0.1,
        *,
        dim: int = -1,
        largest: bool = True,
        hard: bool = False,
        fraction: bool = False,
        relative: bool = False,
        learn_k: bool = False,
        learn_alpha: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        k = positive("k", k, most=1.0 if fraction else math.inf)
        alpha = positive("alpha", alpha)
        if learn_k and fraction and k == 1:
            raise ValueError("k=1.0 as a fraction is the end of its range and cannot be learned from there")
        self.dim, self.largest, self.hard, self.backend = dim, largest, hard, backend
        self.fraction, self.relative = fraction, relative
        if learn_k:
            name, start = ("logit_k", math.log(k / (1 - k))) if fraction else ("log_k", math.log(k))
            self.register_parameter(name, nn.Parameter(torch.tensor(start, dtype=torch.float32)))
        else:
            self.k = k
        if learn_alpha:
            self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha), dtype=torch.float32))
        else:
            self.alpha = alpha

    def budget(self, n: int) -> float | Tensor:
        """The number of elements that rows of length n get, with its gradient where k is learned."""
        if "log_k" in self._parameters:
            return self.log_k.exp()
        share = self.logit_k.sigmoid() if "logit_k" in self._parameters else self.k
        return share * n if self.fraction else share

    def scale(self, x: Tensor) -> float | Tensor:
        """alpha in the units of x, with its gradient: a number, or one value for all rows or for each."""
        alpha = self.log_alpha.exp() if "log_alpha" in self._parameters else self.alpha
        return alpha * spread(x, self.dim) if self.relative else alpha

    def forward(self, x: Tensor, k: float | Tensor | None = None) -> Tensor:
        """The weights of x's elements; k, where given, takes the place of the module's own budget."""
        if k is None:
            k = self.budget(x.shape[self.dim])
        return soft_topk(
            x, k, self.scale(x), dim=self.dim, largest=self.largest, hard=self.hard, backend=self.backend
        )

    def extra_repr(self) -> str:
        with torch.no_grad():
            learned_k = [n for n in ("log_k", "logit_k") if n in self._parameters]
            k = float(self.budget(1)) if learned_k else self.k
            alpha = float(self.log_alpha.exp()) if "log_alpha" in self._parameters else self.alpha
        parts = [f"k={k:.4g}", f"alpha={alpha:.4g}", f"dim={self.dim}"]
        flags = {
            "largest=False": not self.largest,
            "hard=True": self.hard,
            "fraction=True": self.fraction,
            "relative=True": self.relative,
            "learn_k=True": bool(learned_k),
            "learn_alpha=True": "log_alpha" in self._parameters,
            f"backend={self.backend!r}": self.backend is not None,
        }
        return ", ".join(parts + [text for text, shown in flags.items() if shown])


def positive(name: str, value: float, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not (0 < value <= most and value < math.inf):
        raise ValueError(f"{name}={value} must be > 0 and {'finite' if most == math.inf else f'<= {most}'}")
    return float(value)


def spread(x: Tensor, dim: int) -> Tensor:
    """The standard deviation of the finite elements along `dim`, in the compute dtype, without `dim`.

    At least 1e-12 of the largest magnitude and 1e-30, so that alpha is positive in a row of equal values.
    """
    values = x.to(compute_dtype(x.dtype))
    finite = values.isfinite()
    values = torch.where(finite, values, 0)
    unit = values.detach().abs().amax(dim, keepdim=True).clamp(min=1e-18)  # squares must not overflow
    values = values / unit
    count = finite.sum(dim, keepdim=True).clamp(min=1)
    mean = values.sum(dim, keepdim=True) / count
    variance = torch.where(finite, (values - mean).square(), 0).sum(dim, keepdim=True) / count
    return (variance.clamp(min=1e-24).sqrt() * unit).squeeze(dim)
