"""How well an autoencoder does, in one pass over held-out activations, with float64 sums.

The selection is the hard one of round(k_hat). Explained variance is

    1 - sum |x - x_hat|^2 / sum |x - mean|^2      with the mean of all samples,

not the mean of per-batch ratios, which hides a bias between batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from softsae.autoencoder import SparseAutoencoder

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DENSE = 0.1  # a latent active in more than this share of the samples is dense


class Evaluation:
    """Running sums over batches: `update` with each, then `result`."""

    def __init__(self):
        self.samples = 0
        self.origin: Tensor | None = None  # sums are taken about the first batch's mean
        self.sums: dict[str, Tensor] = {}
        self.fired: Tensor | None = None
        self.l0: list[Tensor] = []
        self.k_hat: list[Tensor] = []

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, latents: Tensor, k_hat: Tensor):
        """Add samples x (of a transcoder: its targets), x_hat (B, d) with latents (B, n) and k_hat (B,)."""
        x, x_hat = x.double(), x_hat.double()
        if self.origin is None:
            self.origin = x.mean(0)
        active = latents != 0
        centered = x - self.origin
        sums = {
            "error": (x - x_hat).pow(2).sum(),
            "centered": centered.sum(0),
            "centered_square": centered.pow(2).sum(),
            "product": (x * x_hat).sum(),
            "x_hat_square": x_hat.pow(2).sum(),
            "cosine": F.cosine_similarity(x, x_hat, dim=1).sum(),
        }
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}
        fired = active.sum(0)
        self.fired = fired if self.fired is None else self.fired + fired
        self.l0.append(active.sum(1).cpu())
        self.k_hat.append(k_hat.float().cpu())
        self.samples += len(x)

    def result(self) -> dict:
        """The metrics as plain numbers and lists; `evaluate` describes them."""
        if not self.samples:
            raise ValueError("there are no samples to evaluate on")
        sums = self.sums
        variance = sums["centered_square"] - sums["centered"].pow(2).sum() / self.samples
        frequency = self.fired.double() / self.samples
        return {
            "samples": self.samples,
            "explained_variance": float(1 - sums["error"] / variance),
            "mean_squared_error": float(sums["error"] / self.samples),
            "cosine": float(sums["cosine"] / self.samples),
            "relative_reconstruction_bias": float(sums["x_hat_square"] / sums["product"]),
            "l0": distribution(torch.cat(self.l0)),
            "k_hat": distribution(torch.cat(self.k_hat)),
            "dead_latents": int((self.fired == 0).sum()),
            "dense_latents": int((frequency > DENSE).sum()),
        }


def evaluate(
    sae: SparseAutoencoder, batches: Iterable[Tensor], limit: int | None = None, k: float | None = None
) -> dict:
    """Metrics of an autoencoder on batches of activations (B, d), at most `limit` of them.

    A transcoder is measured against the targets: its batches are pairs (x, target), or tensors
    (B, d + d_out) with both side by side. With k, of the k largest activations of each sample
    (`SparseAutoencoder.forward`).

    Returns a dict: samples; explained_variance; mean_squared_error, the mean of |x - x_hat|^2;
    cosine, the mean cosine of x and x_hat; relative_reconstruction_bias, E|x_hat|^2 / E<x, x_hat>,
    1 without shrinkage (Rajamanoharan et al. 2024); l0 and k_hat, each with mean, sd, min, max and
    the quantiles 0.05 ... 0.95, l0 also with its histogram; dead_latents, never active in these
    samples; dense_latents, active in more than a tenth of them.

    Raises ValueError where there are no samples; errors of `SparseAutoencoder.forward`.
    """
    evaluation = Evaluation()
    training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            for x, target in map(sae.split, islice(batches, limit)):
                x = x.to(sae.b_dec.device).reshape(-1, x.shape[-1])
                out = sae(x, k=k)
                wanted = x if target is None else target.to(x.device).reshape(-1, target.shape[-1])
                evaluation.update(wanted, out.x_hat, out.latents, out.k_hat)
    finally:
        sae.train(training)
    return evaluation.result()


def distribution(values: Tensor) -> dict:
    """mean, sd, min, max and quantiles of values (N,); of integers also the histogram {value: count}."""
    ordered = values.double().sort().values
    places = [round(q * (len(ordered) - 1)) for q in QUANTILES]
    result = {
        "mean": float(ordered.mean()),
        "sd": float(ordered.std(correction=0)),
        "min": float(ordered[0]),
        "max": float(ordered[-1]),
        "quantiles": {str(q): float(ordered[p]) for q, p in zip(QUANTILES, places, strict=True)},
    }
    if not values.is_floating_point():
        found, counts = values.unique(return_counts=True)
        result["histogram"] = dict(zip(map(str, found.tolist()), counts.tolist(), strict=True))
    return result


def explained_variance(x: Tensor, x_hat: Tensor) -> Tensor:
    """1 - sum |x - x_hat|^2 / sum |x - mean|^2 of one batch (B, d), a scalar on its device."""
    return 1 - (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()


@torch.no_grad()
def dictionary_recovery(W_dec: Tensor, directions: Tensor) -> float:
    """Mean over known directions (m, d) of the largest cosine with a decoder row (n, d)."""
    cosines = F.normalize(directions, dim=1) @ F.normalize(W_dec, dim=1).T
    return float(cosines.max(1).values.mean())


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of a and b (N,), ties given their mean rank; NaN for a constant."""
    a, b = average_ranks(a), average_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()))


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1 ... N as float64, equal values sharing the mean of theirs."""
    _, group, counts = values.flatten().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]
