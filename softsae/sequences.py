"""Documents as sequences of token ids of bounded length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softsae.text import Document

MIN_TOKENS = 8  # a shorter rest of a document is left out


@dataclass(frozen=True)
class Sequences:
    """S token sequences, longest first.

    Attributes:
        token_ids: (T,) int32, all sequences behind each other.
        offsets: (S + 1,) int64; sequence s is token_ids[offsets[s] : offsets[s + 1]].
        document: (S,) int32, index into names.
        names: the documents' names.
    """

    token_ids: np.ndarray
    offsets: np.ndarray
    document: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, s: int) -> np.ndarray:
        return self.token_ids[self.offsets[s] : self.offsets[s + 1]]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def longest(self) -> int:
        return int(np.diff(self.offsets).max())

    def draw(self, tokens: int, seed: int) -> Sequences:
        """Sequences drawn at random until they hold `tokens` tokens, in their old order."""
        order = np.random.default_rng(seed).permutation(len(self))
        total = np.cumsum(np.diff(self.offsets)[order])
        taken = np.sort(order[: int(np.searchsorted(total, tokens)) + 1])
        rows = [self[s] for s in taken]
        return Sequences(
            token_ids=np.concatenate(rows),
            offsets=np.cumsum([0] + [len(row) for row in rows]),
            document=self.document[taken],
            names=self.names,
        )

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(token ids (B, T) int64, lengths (B,)) of neighbouring sequences, padded on the right with 0."""
        for start in range(0, len(self), size):
            rows = [self[s] for s in range(start, min(start + size, len(self)))]
            lengths = torch.tensor([len(row) for row in rows])
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
            yield ids, lengths


def tokenize(
    tokenizer,
    documents: Sequence[Document],
    context: int,
    max_tokens: int | None = None,
    bos: int | None = None,
    seed: int = 0,
) -> Sequences:
    """Documents cut into sequences of at most `context` tokens, each led by `bos` if there is one.

    With max_tokens, sequences are drawn at random (by `seed`) from all documents until they hold
    that many tokens.

    Raises:
        ValueError: context or max_tokens too small, no document with MIN_TOKENS tokens.
    """
    if context < MIN_TOKENS:
        raise ValueError(f"context={context} must be at least {MIN_TOKENS} tokens")
    if max_tokens is not None and max_tokens < MIN_TOKENS:
        raise ValueError(f"max_tokens={max_tokens} must be at least {MIN_TOKENS}")
    lead = [] if bos is None else [bos]
    step = context - len(lead)
    pieces: list[np.ndarray] = []
    origin: list[int] = []
    # verbose=False: whole documents are longer than the model's window, and are cut right here.
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False).input_ids
    for number, ids in enumerate(encoded):
        for start in range(0, len(ids), step):
            piece = lead + ids[start : start + step]
            if len(piece) >= MIN_TOKENS:
                pieces.append(np.asarray(piece, dtype=np.int32))
                origin.append(number)
    if not pieces:
        raise ValueError(f"no document of {len(documents)} has {MIN_TOKENS} tokens")
    order = np.random.default_rng(seed).permutation(len(pieces))
    if max_tokens is not None:
        total = np.cumsum([len(pieces[i]) for i in order])
        order = order[: int(np.searchsorted(total, max_tokens)) + 1]
    order = sorted(order, key=lambda i: -len(pieces[i]))  # batches with little padding
    return Sequences(
        token_ids=np.concatenate([pieces[i] for i in order]),
        offsets=np.cumsum([0] + [len(pieces[i]) for i in order]),
        document=np.asarray([origin[i] for i in order], dtype=np.int32),
        names=[d.name for d in documents],
    )
