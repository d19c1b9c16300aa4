"""What a pass of an autoencoder gives; the large parts of it are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from softtopk import SparseCode


@dataclass
class Output:
    """What an autoencoder returns for x of shape (..., d).

    reconstruction: (..., d_out) in normalised units. selected: the latents (..., n), dense or a code.
    k_hat: (...,), float32, the budget of each sample. losses: scalars by name, before weighting.
    overflow: () bool, whether the code lacks something that was selected; None of a dense pass.
    """

    reconstruction: Tensor
    selected: Tensor | SparseCode
    k_hat: Tensor
    losses: dict[str, Tensor]
    overflow: Tensor | None
    denormalize: Callable[[Tensor], Tensor] = field(repr=False)

    @cached_property
    def x_hat(self) -> Tensor:
        """(..., d), in the units and the dtype of x; of a transcoder (..., d_out), the reconstruction of the
        target in the target's units."""
        return self.denormalize(self.reconstruction)

    @property
    def code(self) -> SparseCode | None:
        """The latents of a sparse pass."""
        return self.selected if isinstance(self.selected, SparseCode) else None

    @property
    def latents(self) -> Tensor:
        """(..., n), dense, mostly zeros; of a sparse pass made when it is asked for."""
        return self.selected if self.code is None else self.code.to_dense()
