"""Complexity scores of activations, which AdaptiveK's probe is fitted to, on a scale of 0 ... 10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softsae.activations.pairs import PairSource
from softsae.activations.shards import SCORES, ShardSource
from softsae.activations.tensors import generator_for
from softsae.architectures import AdaptiveKConfig
from softsae.local_dimension import local_dimension
from softsae.metrics import average_ranks

TOP = 10.0  # the highest score


def check_scores(options: AdaptiveKConfig, source):
    """Raises as `scored_samples`, for what can be told without looking at the activations."""
    if options.scores != "local_dimension":
        stored_scores(options, inputs_of(source))


def inputs_of(source):
    """The activations that are encoded: of a transcoder's source those without the target."""
    return source.source if isinstance(source, PairSource) else source


@torch.no_grad()
def scored_samples(options: AdaptiveKConfig, x: Tensor, source, seed: int) -> tuple[Tensor, Tensor]:
    """Activations (N, d) with their scores (N,), float64, in 0 ... 10.

    They are `options.samples` rows of the source, drawn by the seed, or, where its rows cannot be read
    by number, as many of x (M, d). Rows that hold NaN or infinity are left out.

    Raises:
        FileNotFoundError: there is no file with the scores; the message says how to make one.
        ValueError: scores of another number, shape or range, that are not finite or cannot be read; of
            a source without numbered rows; fewer than two samples, or too few for the local dimension.
    """
    source = inputs_of(source)
    scores = None if options.scores == "local_dimension" else stored_scores(options, source)
    if hasattr(source, "read"):
        order = torch.randperm(len(source), generator=generator_for(seed, -2))
        rows = order[: options.samples].sort().values.numpy()
        x = source.read(rows).to(x.device)
        scores = scores if scores is None else torch.from_numpy(scores[rows])
    else:
        x = x[: options.samples]
    finite = x.isfinite().all(1)
    x = x[finite]
    if len(x) < 2:
        raise ValueError(f"the probe of complexity cannot be fitted to {len(x)} samples")
    measured = local_dimension(x, options.neighbours) if scores is None else scores.to(x.device)[finite]
    return x, to_scale(measured, options.mapping)


def to_scale(scores: Tensor, mapping: str) -> Tensor:
    """Scores (N,) of any range as float64 in 0 ... 10; 5 where all are equal.

    mapping: 'ranks' (equal scores share the mean of theirs), 'min_max', or 'none' for scores that are in
    0 ... 10 already, with a ValueError where they are not.
    """
    scores = scores.double()
    if mapping == "ranks":
        scores = average_ranks(scores)
    low, high = scores.min(), scores.max()
    if mapping == "none":
        if low < 0 or high > TOP:
            raise ValueError(
                f"scores lie in {low:g} ... {high:g}, not in 0 ... {TOP:g}: mapping='ranks' or 'min_max'"
            )
        return scores
    if low == high:
        return torch.full_like(scores, TOP / 2)
    return TOP * (scores - low) / (high - low)


def stored_scores(options: AdaptiveKConfig, source) -> np.ndarray:
    """All scores (rows,), float64, of a source: an .npy file's or what was measured beside its shards."""
    if not hasattr(source, "read"):
        kind = type(source).__name__
        raise ValueError(f"scores={options.scores!r}: activations of a {kind} have no numbers to go by")
    if options.scores != "token_loss":
        return read_scores(Path(options.scores), len(source))
    if not isinstance(source, ShardSource):
        raise ValueError("scores='token_loss' is measured by softsae collect, for its shards only")
    file = source.folder / SCORES
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} does not exist: collect with --collect.scores true")
    return read_scores(file, len(source))


def read_scores(path: Path, rows: int) -> np.ndarray:
    """The numbers (rows,) in an .npy file as float64. Raises as `scored_samples`."""
    name = f"scores {str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(f"{name} do not exist")
    try:
        scores = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    if not isinstance(scores, np.ndarray) or scores.dtype.kind not in "fiu":
        raise ValueError(f"{name} have dtype {getattr(scores, 'dtype', None)}; numbers are needed")
    if scores.shape != (rows,):
        raise ValueError(f"{name} have shape {scores.shape}, the activations are {rows} rows")
    scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        first = int(np.argmin(np.isfinite(scores)))
        raise ValueError(f"{name} hold {scores[first]} in row {first}")
    return scores
