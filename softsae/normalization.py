"""What an autoencoder takes from its first samples: shift and scale of their units, and their median."""

from __future__ import annotations

from torch import Tensor


def set_normalization(mode: str, x: Tensor, shift: Tensor, scale: Tensor):
    """Fill shift and scale (d,) from samples x (N, d)."""
    if mode == "standardize":
        shift.copy_(x.mean(0))
        scale.copy_(x.std(0, correction=0))
    elif mode == "unit_mean_square":
        scale.fill_(x.pow(2).mean().sqrt())
    elif mode == "unit_mean_norm":
        scale.fill_(x.pow(2).sum(1).mean().sqrt())
    scale.masked_fill_(scale == 0, 1.0)


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point (d,) with the smallest summed distance to x (N, d), by Weiszfeld's iteration.

    It ends when a step is below `tolerance` times the median distance.
    """
    median = x.mean(0)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1)
        weight = 1 / distance.clamp(min=1e-12 + 1e-9 * distance.max())
        moved = (weight @ x) / weight.sum()
        if (moved - median).norm() <= tolerance * distance.median():
            return moved
        median = moved
    return median
