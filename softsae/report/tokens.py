"""What an autoencoder does on the single tokens of a text: budgets, errors, top tokens of latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softsae.activations.shards import ShardSource
from softsae.sequences import Sequences

BATCH = 1024


@dataclass(frozen=True)
class TokenStatistics:
    """One pass over activations (rows, d), in their order, with n latents.

    k_hat, norm: (rows,) budgets and norms of the activations. error: (rows,) squared error over its
    mean. frequency: (n,) share of rows in which a latent is active; energy: (n,) mean square.
    top_values, top_rows: (m, n) the m largest values of every latent and their rows.
    """

    k_hat: np.ndarray
    norm: np.ndarray
    error: np.ndarray
    frequency: np.ndarray
    energy: np.ndarray
    top_values: np.ndarray
    top_rows: np.ndarray


@torch.no_grad()
def token_statistics(sae, source: ShardSource, top: int = 8) -> TokenStatistics:
    """`TokenStatistics` of an autoencoder on all rows of a folder of activations."""
    device = sae.b_dec.device
    k_hat, norm, error = [], [], []
    n, rows = sae.config.n, 0
    fired, energy = torch.zeros(n, device=device), torch.zeros(n, device=device)
    values = torch.zeros(0, n, device=device)
    places = torch.zeros(0, n, dtype=torch.int64, device=device)
    for x in source.in_order(BATCH):
        x = x.to(device)
        out = sae(x)
        k_hat.append(out.k_hat.float().cpu())
        norm.append(x.norm(dim=1).cpu())
        error.append((x - out.x_hat).pow(2).sum(dim=1).cpu())
        fired += (out.latents != 0).sum(dim=0)
        energy += out.latents.pow(2).sum(dim=0)
        best = out.latents.topk(min(top, len(x)), dim=0)
        joined = torch.cat([values, best.values]), torch.cat([places, best.indices + rows])
        values, order = joined[0].topk(min(top, len(joined[0])), dim=0)
        places = joined[1].gather(0, order)
        rows += len(x)
    errors = torch.cat(error).numpy()
    return TokenStatistics(
        k_hat=torch.cat(k_hat).numpy(),
        norm=torch.cat(norm).numpy(),
        error=errors / errors.mean(),
        frequency=(fired / rows).cpu().numpy(),
        energy=(energy / rows).cpu().numpy(),
        top_values=values.cpu().numpy(),
        top_rows=places.cpu().numpy(),
    )


def by_token(values: np.ndarray, token_ids: np.ndarray, least: int) -> list[tuple[int, float, float, int]]:
    """(token id, mean, standard deviation, count) of values (rows,) per distinct token, by mean.

    Tokens with fewer than `least` occurrences are left out.
    """
    ids, inverse, counts = np.unique(token_ids, return_inverse=True, return_counts=True)
    mean = np.bincount(inverse, values) / counts
    variance = np.bincount(inverse, (values - mean[inverse]) ** 2) / counts
    kept = np.flatnonzero(counts >= least)
    order = kept[np.argsort(mean[kept], kind="stable")]
    return [(int(ids[i]), float(mean[i]), float(variance[i] ** 0.5), int(counts[i])) for i in order]


def telling_latents(statistics: TokenStatistics, count: int) -> np.ndarray:
    """The latents with the largest mean square among those active in 0.05% to 2% of the tokens."""
    frequency = statistics.frequency
    fitting = np.flatnonzero((frequency >= 5e-4) & (frequency <= 0.02))
    return fitting[np.argsort(-statistics.energy[fitting], kind="stable")][:count]


class Shown:
    """Token ids as text, alone and in their context."""

    def __init__(self, tokenizer, sequences: Sequences):
        self.tokenizer, self.sequences = tokenizer, sequences

    def token(self, token_id: int) -> str:
        return self.tokenizer.decode([int(token_id)])

    def context(self, sequence: int, position: int, before: int = 12, after: int = 5) -> str:
        """The text around a token, which stands between «»."""
        ids = self.sequences[sequence]
        left = self.tokenizer.decode(ids[max(0, position - before) : position].tolist())
        right = self.tokenizer.decode(ids[position + 1 : position + 1 + after].tolist())
        return f"{left}«{self.token(ids[position])}»{right}"

    def document(self, sequence: int) -> str:
        return self.sequences.names[self.sequences.document[sequence]]


def passage(
    source: ShardSource, values: np.ndarray, shown: Shown, sequence: int
) -> list[tuple[str, float | None]]:
    """(token text, value) of one sequence in order; None where the position was excluded."""
    rows = np.flatnonzero(source.sequence == sequence)
    found = dict(zip(source.position[rows].tolist(), values[rows].tolist(), strict=True))
    ids = source.sequences[sequence]
    return [(shown.token(token), found.get(place)) for place, token in enumerate(ids)]


def ranks_correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays (rows,)."""
    from softsae.metrics import rank_correlation

    return rank_correlation(torch.from_numpy(np.asarray(a)), torch.from_numpy(np.asarray(b)))


def untrained(sae, first: Tensor):
    """The control: an autoencoder of the same configuration, initialised as training would start."""
    from softsae.autoencoder import SparseAutoencoder

    control = SparseAutoencoder(sae.config).to(sae.b_dec.device)
    control.initialize(*sae.split(first.to(sae.b_dec.device)))
    return control.eval()
