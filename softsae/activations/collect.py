"""Collects the residual stream of a causal language model into a folder of shards.

The attention sinks of many models (position 0 of SmolLM2 has a norm of 23,800 where the median is
150) would dominate the loss of an autoencoder. Positions whose norm exceeds `outlier_factor` times
the median, and a beginning-of-text token that the tokenizer adds, are left out; the manifest says
by which rule, and evaluation applies the same one. With config.scores the model's loss at every
position that is kept is written beside the shards, in the order of their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softsae.activations.shards import ShardSource, ShardWriter, require_empty
from softsae.cross_entropy import LOGIT_BYTES, token_losses
from softsae.language_model import LanguageModel, block_output, hidden_states, residual_stream
from softsae.options import CollectConfig
from softsae.sequences import Sequences

MEDIAN_TOKENS = 4096  # the median norm is taken over this many tokens before anything is written


@dataclass(frozen=True)
class Exclusion:
    """The rule by which positions are excluded: a largest norm, and a first token; None for neither."""

    max_norm: float | None
    bos: int | None

    def __call__(self, token_ids: Tensor, residual: Tensor) -> Tensor:
        """The bool mask (B, T) of excluded positions, for token ids (B, T) and residuals (B, T, d)."""
        mask = torch.zeros_like(token_ids, dtype=torch.bool)
        if self.max_norm is not None:
            mask |= residual.float().norm(dim=-1) > self.max_norm
        if self.bos is not None:
            mask[:, 0] |= token_ids[:, 0] == self.bos
        return mask

    @classmethod
    def of(cls, manifest: dict) -> Exclusion:
        """The rule in the manifest of a folder of activations."""
        rule = manifest.get("excluded", {})
        return cls(rule.get("max_norm"), rule.get("bos"))


def measure_exclusion(lm: LanguageModel, sequences: Sequences, config: CollectConfig) -> Exclusion:
    """The rule for this model and layer, from the norms of the first MEDIAN_TOKENS tokens."""
    bos = None if config.keep_bos else lm.bos()
    if config.outlier_factor is None:
        return Exclusion(None, bos)
    norms, seen = [], 0
    for ids, lengths in sequences.batches(config.batch_size):
        residual = residual_stream(lm, ids, config.layer)
        valid = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        norms.append(residual.float().norm(dim=-1).cpu()[valid])
        seen += len(norms[-1])
        if seen >= MEDIAN_TOKENS:
            break
    return Exclusion(config.outlier_factor * float(torch.cat(norms).nanmedian()), bos)


def collect(
    lm: LanguageModel,
    sequences: Sequences,
    out: str | Path,
    config: CollectConfig,
    exclusion: Exclusion | None = None,
    progress: Callable[[int], object] | None = None,
) -> ShardSource:
    """Writes the activations of all sequences behind block `config.layer` to the folder `out`.

    Args:
        exclusion: the rule for excluded positions; None measures it. Give the training part's rule
            to the held-out part.
        progress: called with the number of tokens after each forward pass.

    Returns:
        The folder, opened.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: layer out of range; non-finite activations (config.nonfinite="refuse"), named by
            document and position; activations too large for config.dtype. Nothing is left of `out`.
    """
    lm.check_layer(config.layer)
    require_empty(Path(out))
    if exclusion is None:
        exclusion = measure_exclusion(lm, sequences, config)
    size, scores = config.batch_size, []
    if config.scores:
        size = min(size, max(1, LOGIT_BYTES // (4 * lm.vocabulary * sequences.longest)))
    first, skipped, excluded = 0, 0, 0
    with ShardWriter(out, lm.d, config.dtype, config.shard_rows) as writer:
        for ids, lengths in sequences.batches(size):
            output = block_output(lm, ids, config.layer)
            residual = hidden_states(output)
            token_ids = ids.to(residual.device)
            places = torch.arange(ids.shape[1], device=residual.device)
            valid = places < lengths.to(residual.device).unsqueeze(1)
            finite = torch.isfinite(residual).all(dim=-1)
            if not finite[valid].all():
                if config.nonfinite == "refuse":
                    raise ValueError(nonfinite_message(sequences, first, ~finite & valid))
                skipped += int((~finite & valid).sum())
            outlier = exclusion(token_ids, residual) & valid & finite
            excluded += int(outlier.sum())
            keep = valid & finite & ~outlier
            sequence, position = torch.nonzero(keep, as_tuple=True)
            writer.add(residual[keep], sequence + first, position)
            if config.scores:
                scores.append(token_losses(lm, config.layer, output, token_ids, lengths)[keep].cpu())
            first += len(ids)
            if progress is not None:
                progress(int(lengths.sum()))
        writer.finish(
            sequences,
            scores=torch.cat(scores).numpy() if config.scores else None,
            model=lm.name,
            gguf_file=lm.gguf_file,
            revision=lm.revision,
            layer=config.layer,
            hook_point=lm.hook_point(config.layer),
            context=config.context,
            excluded={
                "max_norm": exclusion.max_norm,
                "outlier_factor": config.outlier_factor,
                "bos": exclusion.bos,
                "positions": excluded,
                "nonfinite": skipped,
            },
        )
    return ShardSource(out)


def nonfinite_message(sequences: Sequences, first: int, bad: Tensor) -> str:
    row, position = (int(i) for i in torch.nonzero(bad)[0])
    document = sequences.names[sequences.document[first + row]]
    return (
        f"non-finite activation at position {position} of sequence {first + row} (document {document!r});"
        " --collect.nonfinite skip leaves such positions out"
    )
