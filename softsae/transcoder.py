"""How a transcoder starts: its latents have to mean something for the target before any is chosen.

With random decoder rows every active latent adds to the error at first: a budget that is learned falls
to its minimum and stays there, and most latents die.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from softtopk import hard_topk

if TYPE_CHECKING:
    from softsae.autoencoder import SparseAutoencoder

CHUNK = 1024


@torch.no_grad()
def fit_decoder(sae: SparseAutoencoder, x: Tensor, target: Tensor):
    """Turn the decoder's rows to the covariance of their latents with the target, and scale the encoder.

    The scale is the one at which the k largest activations reconstruct the target best. A latent that
    covaries with nothing keeps its random row.

    Args:
        x, target: normalised samples (N, d) and (N, d_out).
    """
    parts = list(zip(x.split(CHUNK), target.split(CHUNK), strict=True))
    total, product = 0, 0
    for rows, wanted in parts:
        a = F.relu(sae.encoder(rows))
        total = total + a.sum(0)
        product = product + a.T @ wanted
    covariance = product - torch.outer(total, target.mean(0))
    norm = covariance.norm(dim=1, keepdim=True)
    sae.W_dec.copy_(torch.where(norm > 0, covariance / norm, sae.W_dec))
    along, square = 0, 0
    for rows, wanted in parts:
        a = F.relu(sae.encoder(rows))
        made = (a * hard_topk(a, sae.config.k)) @ sae.W_dec
        along = along + (made * (wanted - sae.b_dec)).sum()
        square = square + made.pow(2).sum()
    if along > 0:
        sae.W_enc.mul_(along / square)
