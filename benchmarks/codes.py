"""Codes and pre-activations for the benchmarks of the sparse path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.sparse_bars import room

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPONENT = 1.1  # of Zipf's law: latent l fires in proportion to l^-1.1
CHUNK = 256  # rows drawn at once


class Latents(NamedTuple):
    """k entries in each of B rows, with places for more as a code of the selection has them."""

    values: Tensor  # (B, C) float32, 0 in unused places
    indices: Tensor  # (B, C) int32, ascending, n in unused places
    counts: Tensor  # (B,) int32
    peer_values: Tensor  # (B, k) float32
    peer_indices: Tensor  # (B, k) int64


def draw_latents(rows: int, k: int, n: int, kind: str, device: str, seed: int = 0) -> Latents:
    """k different latents of n in every row, uniformly or by Zipf's law without replacement (so that the
    first ones fire nearly everywhere), in a random order of the latents; values are of randn.abs()."""
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(n, generator=generator, device=device)
    weight = torch.zeros(n, device=device)
    if kind == "zipf":
        weight = -EXPONENT * torch.arange(1, n + 1, device=device).log()
    indices = torch.empty(rows, k, dtype=torch.int64, device=device)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        uniform = torch.rand(size, n, generator=generator, device=device).clamp_(1e-20, 1 - 1e-7)
        picked = (weight - (-uniform.log_()).log_()).topk(k, sorted=False).indices  # Gumbel's trick
        indices[start : start + size] = order[picked].sort(dim=1).values
    values = torch.randn(rows, k, generator=generator, device=device).abs()
    places = room(k)
    padded = torch.full((rows, places), n, dtype=torch.int32, device=device)
    padded[:, :k] = indices
    wide = torch.zeros(rows, places, device=device)
    wide[:, :k] = values
    counts = torch.full((rows,), k, dtype=torch.int32, device=device)
    return Latents(wide, padded, counts, values, indices)


def draw_pre(rows: int, n: int, dtype: str, device: str, seed: int = 0) -> Tensor:
    """Pre-activations (rows, n) of randn."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, n, device=device, generator=generator, dtype=torch.float32).to(TORCH[dtype])


def draw_budgets(label: str, rows: int, device: str, seed: int = 1) -> Tensor | int:
    """k of each row, float32, from "32..96", or the number that "64" is."""
    if ".." not in label:
        return int(label)
    low, high = map(int, label.split(".."))
    generator = torch.Generator(device).manual_seed(seed)
    return low + (high - low) * torch.rand(rows, device=device, generator=generator)
