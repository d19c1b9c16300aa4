"""The loss terms, each a scalar before weighting, in normalised units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from softsae.config import RegularizerConfig
from softtopk import hard_topk
from softtopk.budget import excess
from softtopk.squared_error import squared_error


def reconstruction(x: Tensor, x_hat: Tensor) -> Tensor:
    """mean_b |x - x_hat|^2 for x, x_hat (B, d)."""
    return squared_error(x, x_hat)


def nested_reconstruction(
    x: Tensor, latents: Tensor, W_dec: Tensor, b_dec: Tensor, ends: Sequence[int]
) -> Tensor:
    """Mean over prefixes of `reconstruction` from the first 1 ... end latents (Matryoshka).

    Args:
        x: (B, d). latents: (B, n). W_dec: (n, d). b_dec: (d,).
        ends: ends of the prefixes, ascending, the last one n.
    """
    x_hat, start, terms = b_dec, 0, []
    for end in ends:
        x_hat = torch.addmm(x_hat, latents[:, start:end], W_dec[start:end])
        terms.append(reconstruction(x, x_hat))
        start = end
    return torch.stack(terms).mean()


def budget(k_hat: Tensor, k_target: float, beta: float) -> Tensor:
    """softplus_beta(mean_b k_hat - k_target) for k_hat (B,)."""
    return excess(k_hat, k_target, beta)


def regularizers(activations: Tensor, latents: Tensor, config: RegularizerConfig) -> dict[str, Tensor]:
    """R1 and R2 of the configuration (which defines them), where their weight is not 0.

    Selected are the latents (B, n) that are not 0. The gradient goes to the activations (B, n), which
    are >= 0; beside them nothing larger than a mask is kept for it.
    """
    selected = latents.detach() != 0
    units = torch.ones_like(selected[0]) if config.all_units else selected.any(0)
    terms = {}
    if config.r1_weight:
        terms["r1"] = off_support(activations, units & ~selected, config.r1_reduction)
    if config.r2_weight:
        terms["r2"] = l1_over_l2(activations, units)
    return terms


def off_support(a: Tensor, off: Tensor, reduction: str = "sum") -> Tensor:
    """mean_b of the sum of a (B, n) >= 0 over the mask `off` (B, n), or its mean over the mask."""
    count = len(a) if reduction == "sum" else off.sum().clamp(min=1)
    return torch.where(off, a, 0).sum(dtype=wide(a)) / count


SMALLEST_NORM = 1e-6  # in normalised units; the gradient of the ratio is 1 / |a|_2


def l1_over_l2(a: Tensor, units: Tensor) -> Tensor:
    """mean_b |a_b|_1 / |a_b|_2 of a (B, n) >= 0 over the mask `units` (n,); 0 for a row without norm."""
    l1 = torch.where(units, a, 0).sum(1, dtype=wide(a))
    square = torch.where(units, a * a, 0).sum(1, dtype=wide(a))
    ratio = l1 * square.clamp(min=SMALLEST_NORM**2).rsqrt()
    return torch.where(square < SMALLEST_NORM**2, 0, ratio).mean()


def wide(a: Tensor) -> torch.dtype:
    """The dtype of sums over a: float32 or float64."""
    return torch.promote_types(a.dtype, torch.float32)


def auxk(error: Tensor, pre: Tensor, W_dec: Tensor, valid: Tensor | None = None) -> Tensor:
    """|e - W_d z|^2 / |e - mean e|^2 (Gao et al. 2024), z the d/2 largest of the dead latents.

    Args:
        error: e = x - x_hat (B, d); no gradient goes into it.
        pre: pre-activations of the dead latents (B, n_dead): the gradient reaches the encoder.
        W_dec: decoder rows of the dead latents (n_dead, d); no bias in this decode.
        valid: (n_dead,) bool, which of them count; None is all.
    """
    error = error.detach()
    z = F.relu(pre)
    if valid is not None:
        z = torch.where(valid, z, 0)
    limit = error.shape[1] // 2
    if z.shape[1] > limit:
        z = z * hard_topk(z.detach(), limit)
    missed = (error - z @ W_dec).pow(2).sum()
    total = (error - error.mean(0)).pow(2).sum()
    square = error.pow(2).sum()
    total = torch.where(total > 1e-6 * square, total, square)  # one sample differs from no mean
    return missed / total.clamp(min=torch.finfo(total.dtype).tiny)
