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
from softtopk.budget import budget

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
        self,
        sae: SparseAutoencoder,
        x: Tensor,
        a: Tensor | None,
        sparse: Sparse | None = None,
        centered: Tensor | None = None,
    ) -> Tensor:
        """k_hat of x (B, d), given a = relu(W_enc (x - b_dec) + b_enc) (B, n) or, without it, how a sparse
        pass is made and x - b_dec in the dtype of its products."""
        rows, options = len(x), self.options.estimator
        if options.input == "constant":
            x, sparse, centered = self.constant.unsqueeze(0), None, None
            a = F.relu(sae.encoder(x)) if options.kind == "shared" else a
        dtype = products_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            if options.kind == "linear":
                score = (x - (sae.center if options.moves_b_dec else sae.center.detach())) @ self.w2
            elif options.kind == "shared" and sparse is None:
                h = a if options.moves_encoder else a.detach()
                score = h.to(self.w2.dtype) @ self.w2
            else:
                score = self.projection(sae, x, sparse, dtype, centered)
        limits = self.options.k_max, self.options.k_min, self.config.n
        if options.dtype == "bfloat16":
            k_hat = budget((score + self.c2).bfloat16(), self.c2.new_zeros((), dtype=torch.bfloat16), *limits)
        else:
            k_hat = budget(score, self.c2, *limits)
        return k_hat.to(self.w2.dtype).expand(rows)

    def projection(
        self,
        sae: SparseAutoencoder,
        x: Tensor,
        sparse: Sparse | None,
        dtype: torch.dtype,
        centered: Tensor | None,
    ) -> Tensor:
        """w2 . relu(W (x - b_dec) + c) (B,) without keeping the hidden layer; W and c are the encoder's for a
        shared one. The dtype is that of the products of a dense pass."""
        shared, center = self.options.estimator.kind == "shared", sae.center.detach()
        name = "W_enc" if shared else "selector.estimator.W"
        W, c = (sae.W_enc, sae.b_enc) if shared else (self.W, self.c)
        moves = self.options.estimator.moves_encoder if shared else self.options.estimator.moves_b_dec
        if shared and not moves:
            W, c = W.detach(), c.detach()
        if sparse is None:
            sparse = Sparse(dtype=None if dtype == W.dtype else dtype)
        if moves and torch.is_grad_enabled():
            c = c + CenterGradient.apply(sae.center, W.detach())
        options = sparse.of(name)
        if shared:  # W_enc's squares are of all that it is used for
            options["squares"] = None
        rows = sparse.shifted(x, center) if centered is None else centered
        return relu_projection(rows, W, c, self.w2, **options)

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


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x is multiplied in: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
