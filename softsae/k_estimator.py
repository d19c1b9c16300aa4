"""The budget of each sample, estimated from its activations.

    k_hat = clamp(k_max * sigmoid(w2 . relu(W_k (x - b_dec) + c) + c2), k_min, n)

With kind "wide" (arXiv 2605.06610) W_k is (n, d) and starts as a copy of W_enc; with "bottleneck"
it is (width, d). The output is float32 whatever the products are computed in: in bfloat16 a k_hat
of 300 would be quantised in steps of 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softsae.config import AutoencoderConfig


class KEstimator(nn.Module):
    """x (B, d), normalised -> k_hat (B,), of the parameters' dtype."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.options = config.softsae
        estimator = self.options.estimator
        hidden = config.n if estimator.kind == "wide" else estimator.width
        self.W = nn.Parameter(torch.zeros(hidden, config.d))
        self.c = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.zeros(hidden))
        self.c2 = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, b_dec: Tensor) -> Tensor:
        center = b_dec.detach()
        c = self.c
        if self.options.estimator.moves_b_dec:  # the value is c; the gradient to b_dec needs no (B, d)
            c = c - self.W @ (b_dec - center)
        hidden = F.relu(F.linear(x - center, self.W, c), inplace=True)  # [B, hidden]
        with torch.autocast(x.device.type, enabled=False):
            score = hidden.to(self.w2.dtype) @ self.w2 + self.c2
        if self.options.estimator.dtype == "bfloat16":
            score = score.bfloat16()
        k_hat = self.options.k_max * torch.sigmoid(score)
        return k_hat.clamp(self.options.k_min, self.config.n).to(self.w2.dtype)

    @torch.no_grad()
    def initialize(self, W_enc: Tensor, generator: torch.Generator):
        """W_k a copy of W_enc, or random unit rows; w2 and c2 as torch.nn.Linear; then c2 as `init` says."""
        hidden = self.W.shape[0]
        if self.options.estimator.kind == "wide":
            self.W.copy_(W_enc)
        else:
            self.W.copy_(F.normalize(torch.randn(self.W.shape, generator=generator), dim=1))
        bound = 1 / math.sqrt(hidden)
        self.c.zero_()
        self.w2.copy_(torch.empty(hidden).uniform_(-bound, bound, generator=generator))
        self.c2.copy_(torch.empty(()).uniform_(-bound, bound, generator=generator))
        if self.options.estimator.init == "target":
            share = min(self.config.k / self.options.k_max, 0.99)
            self.c2.fill_(math.log(share / (1 - share)))
