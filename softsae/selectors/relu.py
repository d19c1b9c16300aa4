"""ReLU with the L1 penalty sum_i f_i |d_i|, d_i the decoder's rows (Anthropic's April 2024 update)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softsae.config import TrainConfig
from softsae.schedules import Phase, warm
from softsae.selectors.contract import Selection, Selector


class ReLU(Selector):
    """latents = relu(pre)."""

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        latents = torch.relu(pre)
        return Selection(latents, (latents.detach() > 0).sum(1).float())

    def loss_terms(self, sae, target: Tensor, selection: Selection, phase: Phase) -> dict[str, Tensor]:
        return {"l1": (selection.latents @ sae.W_dec.norm(dim=1)).mean()}

    def loss_weights(self, train: TrainConfig, square_norm: float, step: int) -> dict[str, float]:
        options = self.config.relu
        # |x - x_hat|^2 grows with the square of the units, latents with the units themselves.
        return {"l1": options.l1_weight * math.sqrt(square_norm) * warm(step, options.l1_warmup_steps)}
