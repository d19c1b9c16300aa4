"""What a language model loses when its residual stream is replaced by an autoencoder's reconstruction.

    recovered = (CE_zero - CE_sae) / (CE_zero - CE_clean)

with CE_zero for a residual stream of zeros. Positions that training excluded (outliers of the norm,
see activations/collect.py) are treated in two ways: left untouched in every run, the zero-ablated
one included, or replaced like all others. The number is forgiving: print an untrained autoencoder
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from softsae.language_model import (
    LanguageModel,
    block_output,
    hidden_states,
    reconstruct,
    replayed,
    with_hidden_states,
)
from softsae.sequences import Sequences

LOGIT_BYTES = 256 * 2**20  # the logits of one forward pass stay below this


@dataclass
class CrossEntropy:
    """Mean next-token cross-entropy in nats per token, clean and for each replacement.

    `untouched` and `replaced` map "zero" and every autoencoder's name to a cross-entropy, with
    excluded positions left as they are and with them replaced.
    """

    clean: float
    tokens: int
    excluded: int
    untouched: dict[str, float] = field(default_factory=dict)
    replaced: dict[str, float] = field(default_factory=dict)

    def recovered(self, name: str, excluded: str = "untouched") -> float:
        """The recovered share for an autoencoder; `excluded` is "untouched" or "replaced"."""
        runs = {"untouched": self.untouched, "replaced": self.replaced}[excluded]
        gap = runs["zero"] - self.clean
        return (runs["zero"] - runs[name]) / gap if gap else math.nan

    def as_dict(self) -> dict:
        names = [name for name in self.untouched if name != "zero"]
        treatments = ("untouched", "replaced")
        recovered = {t: {name: self.recovered(name, t) for name in names} for t in treatments}
        return {**vars(self), "recovered": recovered}


@torch.no_grad()
def evaluate_cross_entropy(
    lm: LanguageModel,
    sequences: Sequences,
    layer: int,
    autoencoders: Mapping[str, object],
    excluded: Callable[[Tensor, Tensor], Tensor],
    progress: Callable[[int], object] | None = None,
    k: float | None = None,
) -> CrossEntropy:
    """Cross-entropy clean, zero-ablated and with each autoencoder in place of block `layer`'s output.

    The blocks up to `layer` run once for all of them.

    Args:
        sequences: the held-out text as token ids.
        autoencoders: name -> autoencoder with `encode(x, hard=True)` and `decode`.
        excluded: (token_ids (B, T), residual stream (B, T, d)) -> bool mask (B, T) of the positions
            that training excluded.
        progress: called with the number of sequences done after each batch.
        k: keep the k largest activations of each position, by `encode(x, k=k)`.

    Raises:
        ValueError: layer out of range, no sequence with two tokens.
    """
    runs = {"clean": None, "zero": torch.zeros_like} | {
        name: _reconstruction(sae, k) for name, sae in autoencoders.items()
    }
    if len(runs) != 2 + len(autoencoders):
        raise ValueError(f"autoencoders={sorted(autoencoders)}: 'clean' and 'zero' are taken")
    sums = {(name, treatment): 0.0 for name in runs for treatment in ("untouched", "replaced")}
    tokens = left_out = 0
    room = max(1, LOGIT_BYTES // (4 * lm.vocabulary))
    for ids, lengths in sequences.batches(max(1, room // sequences.longest)):
        ids = ids.to(lm.device)
        places = torch.arange(ids.shape[1], device=lm.device)
        valid = places < lengths.to(lm.device).unsqueeze(1)  # [B, T]
        output = block_output(lm, ids, layer)
        x = hidden_states(output)
        mask = excluded(ids, x) & valid
        tokens += int(valid[:, 1:].sum())
        left_out += int(mask.sum())

        def loss(new: Tensor, output=output, ids=ids, valid=valid) -> float:
            return _loss(lm, layer, with_hidden_states(output, new), ids, valid)

        for name, change in runs.items():
            if change is None:
                clean = loss(x)
                sums[name, "untouched"] += clean
                sums[name, "replaced"] += clean
                continue
            new = change(x)
            sums[name, "replaced"] += loss(new)
            sums[name, "untouched"] += loss(torch.where(mask.unsqueeze(-1), x, new))
        if progress is not None:
            progress(len(ids))
    if not tokens:
        raise ValueError("no sequence has two tokens: cross-entropy needs a next token")
    means = {key: total / tokens for key, total in sums.items()}
    return CrossEntropy(
        clean=means["clean", "untouched"],
        tokens=tokens,
        excluded=left_out,
        untouched={name: means[name, "untouched"] for name in runs if name != "clean"},
        replaced={name: means[name, "replaced"] for name in runs if name != "clean"},
    )


def _reconstruction(sae, k: float | None) -> Callable[[Tensor], Tensor]:
    return lambda x: reconstruct(sae, x, k=k)


def _loss(lm: LanguageModel, layer: int, output, ids: Tensor, valid: Tensor) -> float:
    """The summed cross-entropy of every token from its predecessors."""
    with replayed(lm, layer, output):
        logits = lm.model(ids, use_cache=False).logits  # [B, T, vocabulary]
    total = 0.0
    for row, targets, wanted in zip(logits, ids, valid, strict=True):  # one float32 copy at a time
        targets = torch.where(wanted, targets, -100)
        total += cross_entropy(row[:-1].float(), targets[1:], ignore_index=-100, reduction="sum").item()
    return total


@torch.no_grad()
def token_losses(lm: LanguageModel, layer: int, output, ids: Tensor, lengths: Tensor) -> Tensor:
    """What the model loses at every position: the cross-entropy (B, T) of the token that follows, float32.

    The last position of a sequence, which no token follows, gets what it has to expect: the entropy of its
    prediction. Positions of the padding hold NaN.

    Args:
        output: what block `layer` returned (`block_output`) for the token ids (B, T).
        lengths: (B,), how many of a row's tokens are not padding.
    """
    with replayed(lm, layer, output):
        logits = lm.model(ids, use_cache=False).logits  # [B, T, vocabulary]
    losses = torch.full(ids.shape, torch.nan, device=ids.device)
    for loss, row, tokens, length in zip(losses, logits, ids, lengths.tolist(), strict=True):
        logs = row[:length].float().log_softmax(-1)  # one float32 copy at a time
        loss[: length - 1] = -logs[:-1].gather(1, tokens[1:length, None]).squeeze(1)
        loss[length - 1] = torch.special.entr(logs[-1].exp()).sum()
    return losses
