"""Rules that share a budget out over a batch: BatchTopK and Feature Choice.

BatchTopK (Bussmann et al. 2024, arXiv 2412.06410; the Mutual Choice of arXiv 2411.02124) keeps the k B
largest activations of a batch of B samples, Feature Choice (arXiv 2411.02124) the k B / n largest of each
latent. At inference a sample must not depend on its batch: kept are the activations above a threshold, the
running mean of the smallest one that training kept. For Feature Choice, which leaves inference open, each
latent has one of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softsae.config import AutoencoderConfig
from softsae.schedules import Phase
from softsae.selectors.contract import Selection, Selector
from softtopk import hard_topk


class BatchTopK(Selector):
    """latents = a * 1[a among the k B largest of the batch], at inference a * 1[a > threshold]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.options = config.section
        self.register_buffer("threshold", torch.full(self.shape(), torch.inf))  # inf: not known yet
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int64))

    def shape(self) -> tuple[int, ...]:
        """Of the threshold."""
        return ()

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        a = torch.relu_(pre)  # [B, n]
        if phase.step is not None:
            kept = self.of_batch(a.detach())
            self.follow(a.detach(), kept)
        else:
            kept = (a > self.threshold).to(a.dtype)
        latents = a * kept
        return Selection(latents, (latents.detach() != 0).sum(1).float(), a)

    def of_batch(self, a: Tensor) -> Tensor:
        """The mask (B, n) of the k B largest of a."""
        count = min(math.floor(self.config.k * len(a) + 0.5), a.numel())
        flat = a.reshape(-1)
        return (spread_topk(flat, count) if a.is_cuda else hard_topk(flat, count)).view_as(a)

    def smallest(self, kept: Tensor) -> Tensor:
        """Of the positive activations kept (B, n), inf where there are none."""
        return torch.where(kept > 0, kept, torch.inf).min()

    @torch.no_grad()
    def follow(self, a: Tensor, mask: Tensor):
        """Move the threshold to the smallest activation that is kept."""
        self.steps += 1
        smallest = self.smallest(a * mask)
        decay = self.options.threshold_decay
        mean = decay * self.threshold + (1 - decay) * smallest
        moved = torch.where(
            self.threshold.isfinite() & (self.steps > self.options.threshold_from), mean, smallest
        )
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))


class FeatureChoice(BatchTopK):
    """latents = a * 1[a among the k B / n largest of its latent], at inference above its threshold."""

    def shape(self) -> tuple[int, ...]:
        return (self.config.n,)

    def of_batch(self, a: Tensor) -> Tensor:
        count = math.floor(self.config.k * len(a) / a.shape[1] + 0.5)
        return hard_topk(a, min(max(count, 1), len(a)), dim=0)

    def smallest(self, kept: Tensor) -> Tensor:
        return torch.where(kept > 0, kept, torch.inf).amin(0)


def spread_topk(a: Tensor, count: int) -> Tensor:
    """hard_topk of one long row a (N,) for a GPU: its kernel gives a row to one multiprocessor, torch.topk to
    all of them."""
    if count == 0:
        return torch.zeros_like(a)
    least = a.topk(count, sorted=False).values.min()
    above, equal = a > least, a == least
    return (above | equal & (equal.cumsum(0) <= count - above.sum())).to(a.dtype)
