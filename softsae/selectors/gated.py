"""Gated (Rajamanoharan et al. 2024, arXiv 2404.16014): which latents are active apart from how much.

With g = W_enc (x - b_dec) + b_enc the gate's pre-activations and m = e^r (g - b_enc) + b_m:

    latents = 1[g > 0] relu(m),  losses: sum_i relu(g_i) |d_i|  and  |x - (relu(g) W_dec + b_dec)|^2

the second, by which the gates learn to reconstruct, with a decoder that gets no gradient from it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from softsae import losses
from softsae.config import AutoencoderConfig, TrainConfig
from softsae.schedules import Phase, warm
from softsae.selectors.contract import Selection, Selector


class Gated(Selector):
    """The magnitudes share the gates' directions: r (n,) scales them, b_m (n,) is their bias."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.r = nn.Parameter(torch.zeros(config.n))
        self.b_m = nn.Parameter(torch.zeros(config.n))
        self.gate: Tensor | None = None  # relu(g) of the last forward pass, for its loss terms

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        latents = self.activations(sae, pre)
        self.gate = torch.relu(pre) if phase.step is not None else None
        return Selection(latents, (latents.detach() > 0).sum(1).float())

    def activations(self, sae, pre: Tensor) -> Tensor:
        magnitude = torch.relu(self.r.exp() * (pre - sae.b_enc) + self.b_m)
        return torch.where(pre > 0, magnitude, 0)

    def loss_terms(self, sae, target: Tensor, selection: Selection, phase: Phase) -> dict[str, Tensor]:
        if self.gate is None:
            return {}
        gate, self.gate = self.gate, None
        through_gates = torch.addmm(sae.b_dec.detach(), gate, sae.W_dec.detach())
        return {
            "l1": (gate @ sae.W_dec.detach().norm(dim=1)).mean(),
            "gate_reconstruction": losses.reconstruction(target, through_gates),
        }

    def loss_weights(self, train: TrainConfig, square_norm: float, step: int) -> dict[str, float]:
        options = self.config.gated
        # |x - x_hat|^2 grows with the square of the units, latents with the units themselves.
        return {"l1": options.l1_weight * math.sqrt(square_norm) * warm(step, options.l1_warmup_steps)}
