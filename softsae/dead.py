"""Latents that have been silent for long, and AuxK, which revives them.

The gradient of AuxK goes to few rows of the weights. They are copied out, and what they get is added to the
weights' gradients afterwards: through indexing of (n, d) weights every one of them would be written twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softsae import losses
from softsae.reading import Reading
from softsae.sparse import Sparse

if TYPE_CHECKING:
    from softsae.autoencoder import SparseAutoencoder


class DeadList(NamedTuple):
    """indices (m,) int64, all different; valid (m,) bool: which of them are dead latents, others fill up."""

    indices: Tensor
    valid: Tensor


class DeadLatents(nn.Module):
    """Which latents have been silent for more than `dead_after` samples.

    The list of them is renewed every `REFRESH` steps only: latents die slowly. It has a length that the host
    knows without waiting for the device: it is read at one refresh how many can have died by the next. Of
    that number it is the next in a series of lengths, so that it seldom changes.

    Args:
        n: latents.
        dead_after: in samples.
        most: samples that are counted in a step at most.
    """

    REFRESH = 16

    def __init__(self, n: int, dead_after: int, most: int):
        super().__init__()
        self.dead_after, self.most = dead_after, most
        self.register_buffer("silent_for", torch.zeros(n, dtype=torch.int64))  # in samples
        self.register_buffer("listed", torch.zeros(n, dtype=torch.bool))
        self.list = DeadList(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
        self.coming = Reading()

    @torch.no_grad()
    def update(self, fired: Tensor, samples: int):
        """Count a batch of `samples` in which the latents of the mask (n,) were active."""
        self.silent_for.add_(samples).masked_fill_(fired, 0)

    @torch.no_grad()
    def refresh(self, step: int) -> DeadList:
        """The dead latents as of the last refresh; its tensors stay the same while their length does."""
        if step % self.REFRESH == 0:
            self.listed.copy_(self.silent_for > self.dead_after)
            self.fill(self.coming.get())
            self.coming.put(self.can_die_within(self.REFRESH).unsqueeze(0))
        return self.list

    def can_die_within(self, steps: int) -> Tensor:
        return (self.silent_for > self.dead_after - steps * self.most).sum()

    @torch.no_grad()
    def fill(self, most: list | None = None):
        """The list of the latents in `listed`, of which there are at most so many; the host counts them where
        it is not said."""
        length = listed_length(int(self.listed.sum() if most is None else most[0]), len(self.listed))
        if length != len(self.list.indices) or self.list.indices.device != self.listed.device:
            self.list = DeadList(
                torch.empty(length, dtype=torch.int64, device=self.listed.device),
                torch.empty(length, dtype=torch.bool, device=self.listed.device),
            )
        order = self.listed.byte().sort(descending=True, stable=True).indices[:length]
        self.list.indices.copy_(order)
        self.list.valid.copy_(self.listed[order])

    def count(self) -> Tensor:
        """The number of dead latents, on the device."""
        return (self.silent_for > self.dead_after).sum()

    def state(self) -> dict:
        """For a checkpoint, what the buffers do not say."""
        return {"length": len(self.list.indices), "coming": self.coming.pending()}

    def restore(self, state: dict | None):
        """The buffers being restored."""
        state = state or {}
        self.fill([state["length"]] if "length" in state else None)
        self.coming.restore(state.get("coming"))


def listed_length(most: int, n: int) -> int:
    """The next of 0, 64, 128, 192, 256, 320, 384, 448, 512, 640, ...: eight to a doubling; at most n."""
    unit = max(64, 1 << max(most.bit_length() - 4, 0))
    return min(-(-most // unit) * unit, n)


class Revived:
    """AuxK of a batch over the latents of a list.

    Args:
        sae: the autoencoder.
        dead: the list; it is not empty.
        how: of a sparse pass, in the dtype of whose products the weights are taken, or None.
    """

    def __init__(self, sae: SparseAutoencoder, dead: DeadList, how: Sparse | None):
        self.sae, self.dead, self.how = sae, dead, how or Sparse()
        self.rows = {name: self.taken(name) for name in ("W_enc", "b_enc", "W_dec")}

    def taken(self, name: str) -> Tensor:
        rows = getattr(self.sae, name).detach()[self.dead.indices]
        narrow = self.how.dtype is not None and rows.dim() == 2
        return (rows.to(self.how.dtype) if narrow else rows).requires_grad_()

    def loss(self, x: Tensor, reconstruction: Tensor, target: Tensor | None) -> Tensor:
        """Of a batch x (B, d) with its reconstruction (B, d_out) in normalised units."""
        rows = self.sae.normalize(x)
        error = self.sae.target_rows(x, rows, target) - reconstruction
        centered = self.how.shifted(rows, self.sae.center.detach())
        W, b = self.rows["W_enc"], self.rows["b_enc"]
        pre = F.linear(centered, W, b.to(W.dtype))
        return losses.auxk(error, pre, self.rows["W_dec"], self.dead.valid)

    @torch.no_grad()
    def add_gradients(self):
        """After the backward pass: add what the rows got to the gradients of the weights.

        Where the squared norms of the weights' rows were left by the backward pass they are brought up to
        date; where W_dec's gradient was projected, so is what is added.
        """
        for name, taken in self.rows.items():
            weight = getattr(self.sae, name)
            if taken.grad is None:
                continue
            added = taken.grad.to(weight.dtype)
            if name == "W_dec" and self.how.project:
                row = taken.detach().to(weight.dtype)
                added.addcmul_(row, (added * row).sum(1, keepdim=True), value=-1)
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, self.dead.indices, added)
            if name in self.how.squares:
                rows = weight.grad[self.dead.indices]
                self.how.squares[name].index_copy_(0, self.dead.indices, rows.square().sum(1))
