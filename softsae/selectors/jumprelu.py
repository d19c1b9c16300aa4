"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): a threshold for each latent, learned.

latents = z 1[z > theta], with the loss (L0 / k - 1)^2 on the mean count. Neither has a derivative to theta:
within `bandwidth` of a threshold the step is taken for a ramp (a rectangle kernel on the pre-activation).

Threshold and bandwidth are relative to the norm of what is reconstructed. The published 0.001 of both is for
activations of norm 1 and long trainings: few of a batch then lie in the window of a threshold, Adam moves it
by a fraction of the learning rate only, and it has far to go.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from softsae.config import AutoencoderConfig, TrainConfig, square_norm
from softsae.schedules import Phase, warm
from softsae.selectors.contract import Selection, Selector


class JumpReLU(Selector):
    """latents = z * 1[z > theta] for the pre-activations z, theta > 0 in float32."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.options = config.jumprelu
        norm = math.sqrt(square_norm(config))
        self.bandwidth = self.options.bandwidth * norm
        self.threshold = nn.Parameter(torch.full((config.n,), self.options.threshold * norm))

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        latents, gates = Jump.apply(pre, self.threshold, self.bandwidth)
        return Selection(latents, gates.sum(1, dtype=torch.float32))

    def activations(self, sae, pre: Tensor) -> Tensor:
        return Jump.apply(pre, self.threshold, self.bandwidth)[0]

    def loss_terms(self, sae, target: Tensor, selection: Selection, phase: Phase) -> dict[str, Tensor]:
        return {"sparsity": (selection.k_hat.mean() / self.config.k - 1).square()}

    def loss_weights(self, train: TrainConfig, square_norm: float, step: int) -> dict[str, float]:
        rise = warm(step, self.options.sparsity_warmup_steps)
        return {"sparsity": self.options.sparsity_weight * square_norm * rise}


class Jump(torch.autograd.Function):
    """(z 1[z > theta], 1[z > theta]) of z (B, n) and theta (n,)."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        gates = (z > theta).to(z.dtype)
        return z * gates, gates

    @staticmethod
    def backward(ctx, of_latents, of_gates):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() <= ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        of_theta = -(near * (theta * of_latents + of_gates)).sum(0)
        return of_latents * (z > theta), of_theta, None
