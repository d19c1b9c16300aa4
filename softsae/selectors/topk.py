"""TopK (Gao et al. 2024, arXiv 2406.04093): the k largest activations of every row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softsae.schedules import Phase
from softsae.selectors.contract import Selection, Selector
from softsae.sparse import Sparse, encode
from softtopk import hard_topk
from softtopk.gate import gated, rectify


class TopK(Selector):
    """latents = a * 1[a among the k largest of its row], a = relu(pre)."""

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        if phase.regularizer is not None:
            a = torch.relu_(pre)  # [B, n]
            return Selection(a * hard_topk(a.detach(), self.k), self.budgets(x), a)
        a = rectify(pre)
        return Selection(gated(a, hard_topk(a.detach(), self.k), rectified=True), self.budgets(x), a)

    def by_rows(self, phase: Phase) -> bool:
        return True

    def dense_only(self, phase: Phase) -> None:
        return None

    def sparse(self, sae, x: Tensor, phase: Phase, sparse: Sparse) -> Selection:
        return Selection(encode(sae, x, sparse, self.k), self.budgets(x))

    @property
    def k(self) -> int:
        return math.floor(self.config.k + 0.5)

    def budgets(self, x: Tensor) -> Tensor:
        return torch.full(x.shape[:1], float(self.k), device=x.device)
