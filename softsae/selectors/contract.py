"""The contract of a selection rule: from pre-activations to latents, and its own loss terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from softsae.config import AutoencoderConfig, TrainConfig
from softsae.schedules import Phase
from softsae.sparse import Sparse, encode
from softtopk import SparseCode, hard_topk

if TYPE_CHECKING:
    from softsae.autoencoder import SparseAutoencoder


class Selection(NamedTuple):
    """latents (B, n): activations times their gates, dense or a code. k_hat (B,): the float32 budgets.

    activations (B, n): what a top-k rule selected from, >= 0, with its gradient where the phase has a
    regularizer; None of other rules and beside a code. overflow () bool: whether a code has less than was
    selected, where it does not say so itself.
    """

    latents: Tensor | SparseCode
    k_hat: Tensor
    activations: Tensor | None = None
    overflow: Tensor | None = None


class Selector(nn.Module):
    """encoder -> selector -> decoder. A new rule is one file with one subclass.

    What it learns or keeps (estimators, thresholds) are parameters and buffers of the module.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config

    def normed(self) -> tuple[str, ...]:
        """The autoencoder's weights, W_dec apart, with gradients of a sparse pass that come from one function
        which leaves squared norms (`Sparse.squares`): W_enc, where it is in `softsae.sparse.encode` alone."""
        return ("W_enc",)

    def expected_active(self) -> float:
        """The mean number of active latents in a row of a code, as far as it is known before training."""
        return self.config.k

    @classmethod
    def check(cls, config: AutoencoderConfig, source):
        """ValueError or FileNotFoundError where the rule cannot be prepared from a source."""

    def prepare(self, sae: SparseAutoencoder, x: Tensor, source, seed: int) -> dict | None:
        """What the rule needs to know of the activations before training; called once, not on resuming.

        Args:
            sae: the autoencoder, its normalisation set.
            x: the first samples (N, d), in the units of the activations, on the autoencoder's device.
            source: what they are from (softsae/activations), to draw more.
            seed: of the run.

        Returns what is to be recorded with the metrics, None for nothing.
        """

    def forward(self, sae: SparseAutoencoder, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        """Select.

        Args:
            sae: the autoencoder, for its weights.
            x: normalised input (B, d).
            pre: pre-activations (B, n), before the ReLU; may be overwritten.
            phase: alpha, target and whether the selection is hard.
        """
        raise NotImplementedError

    def by_rows(self, phase: Phase) -> bool:
        """Whether a dense step may pass a batch in parts of its rows (softsae/parts.py): what is selected in
        a row then depends on that row alone, given its `row_budgets`, and loss terms on the budgets alone:
        they are asked for once, without a target, for a selection without latents."""
        return False

    def row_budgets(
        self, sae: SparseAutoencoder, x: Tensor, phase: Phase, sparse: Sparse, centered: Tensor
    ) -> Tensor | None:
        """k_hat (B,) of normalised x (B, d), with its gradient, for a rule to which it is given with every
        part, as the last argument of `forward`; else None. centered: softsae.sparse.centered of x."""
        return None

    def dense_only(self, phase: Phase) -> str | None:
        """Why the rule has no sparse path in a phase, None where it has one."""
        return f"{type(self).__name__} has no sparse path"

    def sparse(self, sae: SparseAutoencoder, x: Tensor, phase: Phase, sparse: Sparse) -> Selection:
        """Select without anything of size (B, n) but the pre-activations, as `forward` does.

        x (B, d) is normalised; the rule encodes it by `softsae.sparse.encode`.
        """
        raise NotImplementedError(self.dense_only(phase))

    def most_active(self) -> float:
        """The most latents of a row that a code should have room for at first."""
        return self.config.k

    def activations(self, sae: SparseAutoencoder, pre: Tensor) -> Tensor:
        """What a k given at inference chooses from, (B, n): relu(pre) (B, n), which may be overwritten.

        Of a rule that decides on every latent by itself: its latents.
        """
        return torch.relu_(pre)

    def largest(self, sae: SparseAutoencoder, pre: Tensor, k: Tensor) -> Selection:
        """The round-half-up(k) largest `activations` of every row, k (B,), in place of the rule."""
        a = self.activations(sae, pre)
        return Selection(a * hard_topk(a.detach(), k), torch.floor(k + 0.5), a)

    def sparse_largest(self, sae: SparseAutoencoder, x: Tensor, k: Tensor, sparse: Sparse) -> Selection:
        """The same as a code, of normalised x (B, d), for a rule with a sparse path."""
        return Selection(encode(sae, x, sparse, k), torch.floor(k + 0.5))

    def loss_terms(
        self, sae: SparseAutoencoder, target: Tensor, selection: Selection, phase: Phase
    ) -> dict[str, Tensor]:
        """The rule's own loss terms by name, before weighting.

        target (B, d_out) is what is reconstructed, normalised: x itself, but in a transcoder.
        """
        return {}

    def loss_weights(self, train: TrainConfig, square_norm: float, step: int) -> dict[str, float]:
        """The weights of these terms, 1 where a name is missing; square_norm is mean |target|^2."""
        return {}

    @torch.no_grad()
    def initialize(self, W_enc: Tensor, generator: torch.Generator):
        """Set the rule's own parameters, given the encoder's initial weights (n, d)."""

    def estimator_parameters(self) -> list[nn.Parameter]:
        """Parameters with a learning rate and a clip of their own."""
        return []
