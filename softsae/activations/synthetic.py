"""Activations whose complexity is known: sparse sums of known features, their number varying.

    x = scale * sum_{i in S} c_i d_i,   |S| uniform on min_active ... max_active,   c_i uniform on [1/2, 3/2]

S is a uniformly random subset of the `features` unit directions d_i, and `scale` makes the mean of
x^2 over samples and dimensions 1. With min_active = max_active the complexity is constant: there
an adaptive budget must have no advantage.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from softsae.activations.tensors import generator_for


class SyntheticSource:
    """A source of such activations.

    Args:
        d: width. features: number of known directions.
        min_active, max_active: bounds of the number of active features per sample.
        equal_norm: scale every sample to |x|^2 = d, so that its norm does not tell the number.
        seed: of the directions.
        device: where samples are drawn.

    Attributes: directions (features, d), of unit norm.
    Raises ValueError for bounds that do not fit 1 <= min_active <= max_active <= features.
    """

    def __init__(
        self,
        d: int,
        features: int,
        min_active: int,
        max_active: int,
        equal_norm: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        if not 1 <= min_active <= max_active <= features:
            raise ValueError(
                f"min_active={min_active}, max_active={max_active}:"
                f" 1 <= min_active <= max_active <= features={features} is needed"
            )
        self.d, self.features, self.seed = d, features, seed
        self.min_active, self.max_active, self.equal_norm = min_active, max_active, equal_norm
        self.device = torch.device(device)
        directions = torch.randn(features, d, generator=generator_for(seed, -1))
        self.directions = F.normalize(directions, dim=1).to(self.device)
        # E|x|^2 for |S| = m: m E[c^2] + E[c]^2 m (m - 1) mean_{i != j} <d_i, d_j>, E[c^2] = 13/12.
        total = self.directions.sum(0).pow(2).sum().item()
        cross = (total - features) / max(features * (features - 1), 1)
        counts = torch.arange(min_active, max_active + 1, dtype=torch.float64)
        square = (counts * 13 / 12 + counts * (counts - 1) * cross).mean().item()
        self.scale = (d / square) ** 0.5

    def sample(self, count: int, seed: int, index: int = 0) -> tuple[Tensor, Tensor]:
        """x (count, d) float32 and the number of active features (count,) int64, from (seed, index)."""
        generator = generator_for(seed, index, self.device)
        options = dict(generator=generator, device=self.device)
        active = torch.randint(self.min_active, self.max_active + 1, (count,), **options)
        # The largest of uniform scores, in their random order: the first |S| of them are S.
        chosen = torch.rand(count, self.features, **options).topk(self.max_active, dim=1).indices
        coefficients = torch.rand(count, self.max_active, **options) + 0.5
        rank = torch.arange(self.max_active, device=self.device)
        coefficients = coefficients * (rank < active.unsqueeze(1))
        codes = torch.zeros(count, self.features, device=self.device).scatter_(1, chosen, coefficients)
        x = codes @ self.directions * self.scale
        if self.equal_norm:
            x = F.normalize(x, dim=1) * self.d**0.5
        return x, active

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        index = start
        while True:
            yield self.sample(batch_size, seed, index + 1)[0]
            index += 1
