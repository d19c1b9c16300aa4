"""Dictionaries, activations and folders of shards for the benchmark of encoding.

Pre-activations are to look like those of a trained autoencoder: an activation is the sum of some rows of
W_dec with positive weights and a little noise, so that these latents stand out of the others', which are
mostly below 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softsae import AutoencoderConfig, SoftSAEConfig, SparseAutoencoder
from softsae.activations.shards import ShardWriter
from softsae.architectures import EstimatorConfig
from softsae.sequences import Sequences

BIAS, BIAS_SD = -0.2, 0.1  # of b_enc
NOISE = 0.1  # a coordinate's
SEQUENCE = 128  # tokens


class Weights(NamedTuple):
    """Of a dictionary. Those of a smaller one with the same d are its first rows."""

    W_enc: Tensor  # (n, d), the same tensor as W_dec, as training starts
    b_enc: Tensor  # (n,)
    W_dec: Tensor  # (n, d), rows of unit norm
    b_dec: Tensor  # (d,)

    def first(self, n: int) -> Weights:
        return Weights(self.W_enc[:n], self.b_enc[:n], self.W_dec[:n], self.b_dec)


def draw_weights(n: int, d: int, dtype: torch.dtype, device: str, seed: int = 0) -> Weights:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    W_dec = draw(n, d)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return Weights(W_dec.clone(), BIAS + BIAS_SD * draw(n), W_dec, BIAS_SD * draw(d))


def draw_activations(rows: int, k: int, weights: Weights, seed: int = 0) -> Tensor:
    """(rows, d) in the dtype of the weights: k latents each, uniformly drawn, with weights 0.5 + |randn|."""
    W_dec, device = weights.W_dec, weights.W_dec.device
    generator = torch.Generator(device).manual_seed(seed)
    indices = torch.randint(len(W_dec), (rows, k), device=device, generator=generator)
    values = 0.5 + torch.randn(rows, k, device=device, generator=generator).abs()
    x = F.embedding_bag(indices, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")
    noise = torch.randn(x.shape, device=device, generator=generator)
    return (x + weights.b_dec + NOISE * noise).to(W_dec.dtype)


@torch.no_grad()
def autoencoder(architecture: str, k: int, weights: Weights) -> SparseAutoencoder:
    """With these weights; a softsae with a bottleneck estimator, whose budgets lie about k."""
    (n, d), device, dtype = weights.W_enc.shape, weights.W_enc.device, weights.W_enc.dtype
    config = AutoencoderConfig(d=d, n=n, k=k, architecture=architecture)
    if architecture == "softsae":
        config = config.with_section(SoftSAEConfig(estimator=EstimatorConfig("bottleneck")))
    with torch.device("meta"):  # drawn there, large weights would take longer than all that is measured
        sae = SparseAutoencoder(config)
    sae = sae.to(dtype).to_empty(device=device).eval()
    for name, weight in weights._asdict().items():
        setattr(sae, name, nn.Parameter(weight, requires_grad=False))
    sae.shift.zero_()
    sae.scale.fill_(1)
    if architecture == "softsae":
        estimator = sae.selector.estimator
        generator = torch.Generator(device).manual_seed(1)
        estimator.W.normal_(generator=generator).div_(estimator.W.norm(dim=1, keepdim=True))
        estimator.c.zero_()
        estimator.w2.normal_(0, len(estimator.w2) ** -0.5, generator=generator)
        share = k / sae.config.softsae.k_max
        estimator.c2.fill_(share).logit_()
    return sae


def write_shards(folder: Path, batches: list[Tensor], shard_rows: int) -> Path:
    """Activations as `softsae collect` leaves them, in their own dtype."""
    rows, d = sum(len(x) for x in batches), batches[0].shape[1]
    offsets = np.append(np.arange(0, rows, SEQUENCE), rows)
    tokens = np.zeros(rows, dtype=np.int32)
    sequences = Sequences(tokens, offsets, np.zeros(len(offsets) - 1, dtype=np.int32), ["random"])
    sequence, position = (torch.from_numpy(part) for part in np.divmod(np.arange(rows), SEQUENCE))
    dtype = str(batches[0].dtype).removeprefix("torch.")
    with ShardWriter(folder, d, dtype, shard_rows) as writer:
        first = 0
        for x in batches:
            here = slice(first, first + len(x))
            writer.add(x, sequence[here], position[here])
            first += len(x)
        return writer.finish(sequences)
