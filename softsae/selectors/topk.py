"""TopK (Gao et al. 2024, arXiv 2406.04093): the k largest activations of every row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softsae.schedules import Phase
from softsae.selectors.contract import Selection, Selector
from softsae.sparse import Sparse, encode
from softtopk import hard_topk


class TopK(Selector):
    """latents = a * 1[a among the k largest of its row], a = relu(pre)."""

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        a = torch.relu_(pre)  # [B, n]
        latents = a * hard_topk(a.detach(), self.k)
        return Selection(latents, self.budgets(x), a)

    def dense_only(self, phase: Phase) -> None:
        return None

    def sparse(self, sae, x: Tensor, phase: Phase, sparse: Sparse) -> Selection:
        return Selection(encode(sae, x, sparse, self.k), self.budgets(x))

    @property
    def k(self) -> int:
        return math.floor(self.config.k + 0.5)

    def budgets(self, x: Tensor) -> Tensor:
        return torch.full(x.shape[:1], float(self.k), device=x.device)
