"""The inputs that tests and benchmarks share: families of rows, budgets, scales, lengths.

Every family is a function (rows, n, generator) -> float32 tensor (rows, n) on the CPU, the same
for a seed on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
LENGTHS = (1, 2, 31, 4096, 16384, 65536)


def budgets(n: int) -> list[float]:
    """The budgets of the accuracy bars that lie inside (0, n)."""
    candidates = (0.5, 1, 32, 32.5, n / 8, 0.75 * n, n - 0.5)
    return sorted({float(k) for k in candidates if 0 < k < n})


def normal(rows: int, n: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, n, generator=g)


def relu(rows: int, n: int, g: torch.Generator) -> Tensor:
    return normal(rows, n, g).relu()


def heavy_tailed(rows: int, n: int, g: torch.Generator) -> Tensor:
    """Student's t with 1.5 degrees of freedom or so: normal over the square root of a small gamma."""
    return normal(rows, n, g) / torch.rand(rows, n, generator=g).clamp(min=1e-6).pow(2 / 3)


def tied(rows: int, n: int, g: torch.Generator) -> Tensor:
    """About 60 distinct values: every one of them many times."""
    return (normal(rows, n, g) * 8).round() / 8


def offset(rows: int, n: int, g: torch.Generator) -> Tensor:
    return normal(rows, n, g) + 100


def constant(rows: int, n: int, g: torch.Generator) -> Tensor:
    return torch.full((rows, n), 0.3)


def two_values(rows: int, n: int, g: torch.Generator) -> Tensor:
    return (torch.rand(rows, n, generator=g) < 0.3).float()


def ascending(rows: int, n: int, g: torch.Generator) -> Tensor:
    return normal(rows, n, g).sort(1).values


def descending(rows: int, n: int, g: torch.Generator) -> Tensor:
    return normal(rows, n, g).sort(1, descending=True).values


def outlier(rows: int, n: int, g: torch.Generator) -> Tensor:
    x = normal(rows, n, g)
    x[:, n // 3] = 1e30
    return x


def narrow(rows: int, n: int, g: torch.Generator) -> Tensor:
    return 1 + 1e-4 * normal(rows, n, g)


def negative(rows: int, n: int, g: torch.Generator) -> Tensor:
    return -normal(rows, n, g).abs() - 0.1


def huge_range(rows: int, n: int, g: torch.Generator) -> Tensor:
    """Both signs, magnitudes from 1e-30 to 1e30."""
    return normal(rows, n, g).sign() * 10 ** (60 * torch.rand(rows, n, generator=g) - 30)


def denormal(rows: int, n: int, g: torch.Generator) -> Tensor:
    """Whole multiples of the smallest float32."""
    return normal(rows, n, g).mul(1000).round() * 2.0**-149


# The families of the accuracy bars, and those that break a solver rather than its precision.
BAR_FAMILIES = {f.__name__: f for f in (normal, relu, heavy_tailed, tied, offset)}
ADVERSARIAL_FAMILIES = {
    f.__name__: f
    for f in (
        constant,
        two_values,
        ascending,
        descending,
        outlier,
        narrow,
        negative,
        huge_range,
        denormal,
    )
}
FAMILIES = BAR_FAMILIES | ADVERSARIAL_FAMILIES


def make(family: str, rows: int, n: int, seed: int = 0) -> Tensor:
    """`rows` rows of a family, (rows, n) float32."""
    return FAMILIES[family](rows, n, torch.Generator().manual_seed(seed))


def gapped(gap: float, alpha: float, above: int, n: int, seed: int = 0) -> Tensor:
    """One row whose `above` largest elements are `gap` alpha away from the rest: an integer k in a gap."""
    x = 3 * alpha * normal(1, n, torch.Generator().manual_seed(seed))
    x[:, :above] = x[:, :above].abs() + gap * alpha / 2
    x[:, above:] = -x[:, above:].abs() - gap * alpha / 2
    return x
