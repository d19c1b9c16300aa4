"""MSAE, hierarchical Matryoshka (Zaigrajew et al. 2025, arXiv 2502.20578): several k over one encoder.

The k largest activations of every k in `ks` reconstruct the target by themselves, and their losses are
averaged. One ranking serves all: the latents of a smaller k are among those of a larger one, so that a
reconstruction is the previous one and the latents between them. Few of these are decoded as the rows of
W_dec that they choose, many by a product with all of W_dec. Inference uses `k`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from softsae import losses
from softsae.config import AutoencoderConfig
from softsae.schedules import Phase
from softsae.selectors.contract import Selection, Selector
from softsae.sparse import Sparse, decode_groups, encode
from softtopk import SparseCode, hard_topk

FEW = 32  # up to n / 32 latents a row, adding rows of W_dec takes less than the product


class MSAE(Selector):
    """latents = a * 1[a among the k largest of its row], a = relu(pre)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.options = config.msae
        self.k = math.floor(config.k + 0.5)
        # Of the last training pass, for its loss terms: the ranking or, of a sparse one, what it needs.
        self.ranking: Tensor | None = None
        self.nested: tuple[SparseCode, Tensor, Sparse] | None = None

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        a = torch.relu_(pre)  # [B, n]
        if phase.step is None:
            mask = hard_topk(a.detach(), self.k)
        else:
            self.ranking = self.rank(a.detach())
            mask = torch.zeros_like(a).scatter_(1, self.ranking[:, : self.k], 1)
        return Selection(a * mask, torch.full(a.shape[:1], float(self.k), device=a.device), a)

    def rank(self, a: Tensor) -> Tensor:
        """Columns (B, largest k below n) of a (B, n), the largest first, ties by the lower index."""
        last = max([self.k, *(k for k in self.options.ks if k < a.shape[1])])
        values, indices, _ = hard_topk(a, last, return_indices=True)
        order = values.argsort(dim=1, descending=True, stable=True)
        return indices.clamp(min=0).gather(1, order)  # -1 stands in a row of NaN

    def dense_only(self, phase: Phase) -> str | None:
        if phase.step is not None and self.options.ks[-1] >= self.config.n:
            return f"ks holds n={self.config.n}: all activations are decoded"
        return None

    def sparse(self, sae, x: Tensor, phase: Phase, sparse: Sparse) -> Selection:
        k_hat = torch.full(x.shape[:1], float(self.k), device=x.device)
        if phase.step is None:
            return Selection(encode(sae, x, sparse, self.k), k_hat)
        code = encode(sae, x, sparse, self.options.ks[-1])
        values = code.values.detach()
        order = values.argsort(dim=1, descending=True, stable=True)
        place = torch.arange(values.shape[1], device=x.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)  # (B, C)
        self.nested = code, sum((rank >= k).int() for k in self.options.ks), sparse
        return Selection(code.with_values(torch.where(rank < self.k, code.values, 0)), k_hat)

    def expected_active(self) -> float:
        return self.options.ks[-1]

    def most_active(self) -> float:
        return self.options.ks[-1]

    def loss_terms(self, sae, target: Tensor, selection: Selection, phase: Phase) -> dict[str, Tensor]:
        if phase.step is None:
            return {}
        ks = self.options.ks
        terms = [losses.reconstruction(target, x_hat) for x_hat in self.reconstructions(sae, selection)]
        weights = range(len(ks), 0, -1) if self.options.weighting == "reverse" else [1] * len(ks)
        mean = sum(weight * term for weight, term in zip(weights, terms, strict=True)) / sum(weights)
        return {"reconstruction": mean}

    def reconstructions(self, sae, selection: Selection) -> Iterator[Tensor]:
        """Of the k largest activations for every k of the list."""
        if self.nested is not None:
            (code, group, sparse), self.nested = self.nested, None
            yield from decode_groups(sae, code, group, len(self.options.ks), sparse)
            return
        a, ranking, self.ranking = selection.activations, self.ranking, None
        x_hat, start = sae.b_dec, 0
        for k in self.options.ks:
            x_hat = x_hat + self.between(sae.W_dec, a, ranking, start, k)
            yield x_hat
            start = k

    def between(self, W_dec: Tensor, a: Tensor, ranking: Tensor, start: int, end: int) -> Tensor:
        """Decode the activations a (B, n) of the ranks start ... end - 1 of each row."""
        n = a.shape[1]
        if end == n:  # all that come after `start`: their order is of no interest
            rest = torch.ones_like(a, dtype=torch.bool).scatter_(1, ranking[:, :start], False)
            return torch.where(rest, a, 0) @ W_dec
        chosen = ranking[:, start:end]
        values = a.gather(1, chosen)
        if chosen.shape[1] * FEW <= n:
            return F.embedding_bag(chosen, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")
        return torch.zeros_like(a).scatter(1, chosen, values) @ W_dec
