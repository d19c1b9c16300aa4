"""The budget of each sample, estimated from its activations.

    k_hat = clamp(k_max * sigmoid(w2 . h(x) + c2), k_min, n)

    kind          h(x)
    "wide"        relu(W_k (x - b_dec) + c), W_k (n, d) a copy of W_enc at the start (arXiv 2605.06610)
    "bottleneck"  the same with W_k (width, d)
    "shared"      relu(W_enc (x - b_dec) + b_enc), the autoencoder's own activations
    "linear"      x - b_dec

Here b_dec is the centre of the encoder: in a transcoder b_in.

The output is float32 whatever the products are computed in: in bfloat16 a k_hat of 300 would be
quantised in steps of 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softsae.config import AutoencoderConfig, square_norm
from softsae.sparse import CenterGradient, Sparse
from softtopk import relu_projection

if TYPE_CHECKING:
    from softsae.autoencoder import SparseAutoencoder


class KEstimator(nn.Module):
    """Normalised x (B, d) and the autoencoder's activations of it -> k_hat (B,), of the parameters' dtype.

    Parameters: w2 (hidden,), c2 () and, where it has an encoder of its own, W (hidden, d), c (hidden,).
    Buffer, with input "constant" only: constant (d,), which stands in for every x.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.options = config.softsae
        kind, d = self.options.estimator.kind, config.d
        hidden = {"bottleneck": self.options.estimator.width, "linear": d}.get(kind, config.n)
        if kind in ("wide", "bottleneck"):
            self.W = nn.Parameter(torch.zeros(hidden, d))
            self.c = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.zeros(hidden))
        self.c2 = nn.Parameter(torch.zeros(()))
        if self.options.estimator.input == "constant":
            self.register_buffer("constant", torch.zeros(d))

    def forward(
        self, sae: SparseAutoencoder, x: Tensor, a: Tensor | None, sparse: Sparse | None = None
    ) -> Tensor:
        """k_hat of x (B, d), given a = relu(W_enc (x - b_dec) + b_enc) (B, n) or, without it, how a sparse
        pass is made."""
        rows = len(x)
        if self.options.estimator.input == "constant":
            x, sparse = self.constant.unsqueeze(0), None
            a = F.relu(sae.encoder(x)) if self.options.estimator.kind == "shared" else a
        if sparse is not None and self.options.estimator.kind != "linear":
            score = self.sparse_score(sae, x, sparse) + self.c2
        else:
            h = self.features(x, a, sae.center)  # [B or 1, hidden]
            with torch.autocast(x.device.type, enabled=False):
                score = h.to(self.w2.dtype) @ self.w2 + self.c2
        if self.options.estimator.dtype == "bfloat16":
            score = score.bfloat16()
        k_hat = self.options.k_max * torch.sigmoid(score)
        return k_hat.clamp(self.options.k_min, self.config.n).to(self.w2.dtype).expand(rows)

    def sparse_score(self, sae: SparseAutoencoder, x: Tensor, sparse: Sparse) -> Tensor:
        """w2 . h (B,) without h (B, hidden)."""
        options, center = self.options.estimator, sae.center.detach()
        name = "W_enc" if options.kind == "shared" else "selector.estimator.W"
        W, c = (sae.W_enc, sae.b_enc) if options.kind == "shared" else (self.W, self.c)
        moves = options.moves_encoder if options.kind == "shared" else options.moves_b_dec
        if options.kind == "shared" and not moves:
            W, c = W.detach(), c.detach()
        if moves and torch.is_grad_enabled():
            c = c + CenterGradient.apply(sae.center, sparse.copies.get(name, W).detach())
        more = {"copy": sparse.copies.get(name)} if options.kind == "shared" else sparse.of(name)
        return relu_projection(sparse.cast(x - center, name), W, c, self.w2, **more)

    def features(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """h (B, hidden); what of it the gradient of k_hat reaches is said by the options."""
        options = self.options.estimator
        if options.kind == "shared":
            return a if options.moves_encoder else a.detach()
        if options.kind == "linear":
            return x - (b if options.moves_b_dec else b.detach())
        center = b.detach()
        c = self.c
        if options.moves_b_dec and torch.is_grad_enabled():
            c = c + CenterGradient.apply(b, self.W.detach())
        return F.relu(F.linear(x - center, self.W, c), inplace=True)

    @torch.no_grad()
    def initialize(self, W_enc: Tensor, generator: torch.Generator):
        """W_k a copy of W_enc, or random unit rows; w2 and c2 as torch.nn.Linear, then as `init` says."""
        options, hidden = self.options.estimator, len(self.w2)
        if options.kind == "wide":
            self.W.copy_(W_enc)
            self.c.zero_()
        elif options.kind == "bottleneck":
            self.W.copy_(F.normalize(torch.randn(self.W.shape, generator=generator), dim=1))
            self.c.zero_()
        bound = 1 / math.sqrt(hidden)
        self.w2.copy_(torch.empty(hidden).uniform_(-bound, bound, generator=generator))
        self.c2.copy_(torch.empty(()).uniform_(-bound, bound, generator=generator))
        if options.init == "target":
            share = min(self.config.k / self.options.k_max, 0.99)
            self.c2.fill_(math.log(share / (1 - share)))
            self.w2.zero_()
        if options.input == "constant":
            direction = F.normalize(torch.randn(self.config.d, generator=generator), dim=0)
            self.constant.copy_(direction * math.sqrt(square_norm(self.config, self.config.d)))
