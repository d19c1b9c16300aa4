"""TopK (Gao et al. 2024, arXiv 2406.04093): the k largest activations of every row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softsae.schedules import Phase
from softsae.selectors.contract import Selection, Selector
from softtopk import hard_topk


class TopK(Selector):
    """latents = a * 1[a among the k largest of its row], a = relu(pre)."""

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        a = torch.relu_(pre)  # [B, n]
        k = math.floor(self.config.k + 0.5)
        latents = a * hard_topk(a.detach(), k)
        return Selection(latents, torch.full(a.shape[:1], float(k), device=a.device), a)
