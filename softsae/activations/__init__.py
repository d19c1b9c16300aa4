"""Activations to train on: tensors, iterators, .npy files, folders of shards from a language model.

A source has `.d`, the width, and `.batches(batch_size, seed, start)` (`activations/tensors.py`); one for a
transcoder also has `.d_out` and holds inputs and targets side by side (`activations/pairs.py`).
"""

from __future__ import annotations

from pathlib import Path

from softsae.activations import tensors
from softsae.activations.npy import NpySource
from softsae.activations.pairs import PairSource
from softsae.activations.shards import MANIFEST, ShardSource

TRAIN, HELDOUT = "train", "heldout"  # the two folders that `softsae collect` makes


def widths(source) -> tuple[int, int | None]:
    """The width of a source's activations and that of their targets, None where it has none."""
    return source.d, getattr(source, "d_out", None)


def as_source(activations, target=None):
    """A source as it is; anything else that holds activations as one.

    Args:
        activations: a source, a tensor (samples, d), an iterable of tensors or of pairs (x, target), or
            a path: an .npy file, a folder of shards, or what `softsae collect` made, whose training part
            is taken.
        target: what a transcoder makes of them, row by row: a tensor (samples, d_out) or a path.

    Raises:
        FileNotFoundError: a path that does not exist or holds no activations.
        TypeError, ValueError: what is there cannot be used; the message names it.
    """
    if target is not None:
        return PairSource(as_source(activations), as_source(target))
    if not isinstance(activations, (str, Path)):
        return tensors.as_source(activations)
    path = Path(activations)
    if path.suffix == ".npy" or path.is_file():
        return NpySource(path)
    if not path.exists():
        raise FileNotFoundError(f"activations {str(path)!r} do not exist")
    if not (path / MANIFEST).is_file() and (path / TRAIN / MANIFEST).is_file():
        path = path / TRAIN
    return ShardSource(path)


def heldout_beside(activations) -> Path | None:
    """The held-out part that `softsae collect` made beside the training part at a path, if any."""
    path = Path(activations)
    for folder in (path / HELDOUT, path.parent / HELDOUT):
        if (folder / MANIFEST).is_file() and folder != path:
            return folder
    return None
