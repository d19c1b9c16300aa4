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
from softsae.sparse import Sparse, encode, only, places
from softtopk import SparseCode, hard_topk

ROOM = 4  # times k: the places of a row in a batch's code at first; more are made where a row needs them


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
        count = min(self.count(len(a)), a.numel())
        flat = a.reshape(-1)
        return (spread_topk(flat, count) if a.is_cuda else hard_topk(flat, count)).view_as(a)

    def count(self, rows: int) -> int:
        """How many activations of a batch are kept."""
        return math.floor(self.config.k * rows + 0.5)

    def dense_only(self, phase: Phase) -> str | None:
        return None

    def sparse(self, sae, x: Tensor, phase: Phase, sparse: Sparse) -> Selection:
        room = sparse.max_active or places(self.most_active())
        if phase.step is None:
            threshold = self.threshold.float().expand(self.config.n).contiguous()
            code = encode(sae, x, sparse, self.config.n, threshold=threshold, max_active=room)
            return Selection(code, code.counts.float())
        # The batch's largest are among the rows' largest, as long as each row has one left that is not kept.
        most = encode(sae, x, sparse, room, max_active=room, check=False)
        kept = self.of_code(most)
        code = only(most, kept)
        overflow = (code.counts == room).any()
        self.follow(most.values.detach(), kept, overflow)
        return Selection(code, code.counts.float(), overflow=overflow)

    def of_code(self, code: SparseCode) -> Tensor:
        """The mask (B, C) of the entries that are among the k B largest of the batch."""
        values = code.values.detach()
        count = min(self.count(len(values)), values.numel())
        flat = values.reshape(-1)
        mask = spread_topk(flat, count) if flat.is_cuda else hard_topk(flat, count)
        return (mask.view_as(values) > 0) & (values > 0)

    def most_active(self) -> float:
        return min(ROOM * self.config.k, self.config.n)

    def smallest(self, kept: Tensor) -> Tensor:
        """Of the positive activations kept (B, n), inf where there are none."""
        return torch.where(kept > 0, kept, torch.inf).min()

    @torch.no_grad()
    def follow(self, a: Tensor, mask: Tensor, skip: Tensor | None = None):
        """Move the threshold to the smallest activation that is kept; not where `skip`, () bool, is True."""
        self.steps += 1
        smallest = self.smallest(a * mask)
        decay = self.options.threshold_decay
        mean = decay * self.threshold + (1 - decay) * smallest
        moved = torch.where(
            self.threshold.isfinite() & (self.steps > self.options.threshold_from), mean, smallest
        )
        known = smallest.isfinite()
        if skip is not None:
            known = known & ~skip
        self.threshold.copy_(torch.where(known, moved, self.threshold))


class FeatureChoice(BatchTopK):
    """latents = a * 1[a among the k B / n largest of its latent], at inference above its threshold."""

    def shape(self) -> tuple[int, ...]:
        return (self.config.n,)

    def of_batch(self, a: Tensor) -> Tensor:
        count = math.floor(self.config.k * len(a) / a.shape[1] + 0.5)
        return hard_topk(a, min(max(count, 1), len(a)), dim=0)

    def smallest(self, kept: Tensor) -> Tensor:
        return torch.where(kept > 0, kept, torch.inf).amin(0)

    def dense_only(self, phase: Phase) -> str | None:
        return None if phase.step is None else "FeatureChoice ranks the samples of each latent"


def spread_topk(a: Tensor, count: int) -> Tensor:
    """hard_topk of one long row a (N,) for a GPU: its kernel gives a row to one multiprocessor, torch.topk to
    all of them."""
    if count == 0:
        return torch.zeros_like(a)
    least = a.topk(count, sorted=False).values.min()
    above, equal = a > least, a == least
    return (above | equal & (equal.cumsum(0) <= count - above.sum())).to(a.dtype)
