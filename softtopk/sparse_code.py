"""SparseCode: a batch of rows of n latents of which few are active."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softtopk import dispatch
from softtopk.backends.reference import compute_dtype
from softtopk.backends.reference_sparse import compacted
from softtopk.sparse_checks import check_room, matrix


class Transposed(NamedTuple):
    """A code by latent: entries[offsets[l]:offsets[l + 1]] are the places row * C + j of latent l."""

    offsets: Tensor  # (n + 1,) int32
    entries: Tensor  # (rows * C,) int32; what lies behind offsets[n] is unspecified


class Transposition:
    """Transposes a code at its first use, once for the backward passes of all that is made of it."""

    __slots__ = "kernels", "n", "made"

    def __init__(self, kernels, n: int):
        self.kernels, self.n, self.made = kernels, n, None

    def __call__(self, indices: Tensor, counts: Tensor) -> Transposed:
        if self.made is None:
            if indices.numel() >= 2**31:
                raise ValueError(f"a code of {tuple(indices.shape)} places has more than 32 bits can number")
            self.made = Transposed(*self.kernels.transpose(indices, counts, self.n))
        return self.made


class SparseCode:
    """The active latents of a batch, sorted by index in every row.

    Made by `soft_topk_code`, `hard_topk_code`, `encode_soft_topk`, `encode_hard_topk` and `from_dense`; taken
    by `sparse_decode`. With C places for each of the `rows` rows (the product of shape[:-1]):

    Attributes:
        values: (rows, C), differentiable, float64 for float64 pre-activations, else float32; 0 in unused
            places. An entry can have the value 0: it is there for the gradient of k.
        indices: (rows, C) int32, ascending within a row, n in unused places.
        counts: (rows,) int32, the entries that a row has. A count above C says that the row was cut to its
            first C entries in index order (`overflow`).
        shape: the shape of the dense tensor, (..., n).
    """

    __slots__ = "counts", "indices", "shape", "transposition", "values"

    def __init__(
        self,
        values: Tensor,
        indices: Tensor,
        counts: Tensor,
        shape: tuple[int, ...],
        transposition: Transposition,
    ):
        self.values, self.indices, self.counts = values, indices, counts
        self.shape, self.transposition = tuple(shape), transposition

    @classmethod
    def from_dense(
        cls, x: Tensor, max_active: int | None = None, *, backend: str | None = None
    ) -> SparseCode:
        """The code of the nonzero elements of x (..., n), differentiable in x.

        Without max_active there is room for the fullest row, for which the host waits for the device.
        """
        rows = matrix("x", x, backend)
        kept = rows != 0
        counts = kept.sum(1, dtype=torch.int32)
        if max_active is None:
            max_active = max(1, int(counts.max())) if len(rows) else 1
        check_room(max_active)
        n = x.shape[-1]
        indices, _ = compacted(kept, max_active)
        values = torch.where(indices < n, rows.gather(1, indices.long().clamp(max=n - 1)), 0)
        values = values.to(compute_dtype(x.dtype))
        kernels = dispatch.sparse_kernels(backend, x.device)
        return cls(values, indices, counts, x.shape, Transposition(kernels, n))

    @property
    def overflow(self) -> Tensor:
        """() bool on the device: whether a row was cut."""
        return (self.counts > self.max_active).any()

    @property
    def max_active(self) -> int:
        """C, the places of a row."""
        return self.indices.shape[1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def transposed(self) -> Transposed:
        """The entries by latent, made at the first call and kept."""
        return self.transposition(self.indices, self.counts)

    def with_values(self, values: Tensor) -> SparseCode:
        """A code of the same entries and transposition with other values (rows, C)."""
        if values.shape != self.indices.shape:
            given, own = tuple(values.shape), tuple(self.indices.shape)
            raise ValueError(f"values has shape {given}; {own} is needed")
        return SparseCode(values, self.indices, self.counts, self.shape, self.transposition)

    def detach(self) -> SparseCode:
        """The same code without gradient."""
        return self.with_values(self.values.detach())

    def to_dense(self) -> Tensor:
        """(..., n) in the dtype of the values, differentiable."""
        return scattered(self.values, self.indices, self.shape[-1]).view(self.shape)

    def to_csr(self) -> Tensor:
        """A torch sparse CSR tensor (rows, n) of the entries, those of value 0 too, differentiable in the
        values. The host waits for the device: the number of entries is a shape."""
        used = self.indices < self.shape[-1]
        starts = torch.nn.functional.pad(used.sum(1).cumsum(0), (1, 0))
        size = (len(self.counts), self.shape[-1])
        return torch.sparse_csr_tensor(starts, self.indices[used].long(), self.values[used], size)

    def fired(self) -> Tensor:
        """(n,) bool: the latents that are not 0 in some row."""
        n = self.shape[-1]
        latents = torch.where(self.values != 0, self.indices, n).flatten()
        fired = torch.zeros(n + 1, dtype=torch.bool, device=self.device)
        return fired.index_fill_(0, latents.long(), True)[:n]

    def l0(self) -> Tensor:
        """() float32: the mean number of values of a row that are not 0."""
        return (self.values != 0).sum(1).float().mean()

    def __repr__(self) -> str:
        return (
            f"SparseCode(shape={self.shape}, max_active={self.max_active}, dtype={self.values.dtype},"
            f" device={str(self.device)!r})"
        )


def scattered(values: Tensor, indices: Tensor, n: int) -> Tensor:
    """(rows, n) with the values (rows, C) at their indices, 0 elsewhere; an index n is no place."""
    rows = len(values)
    starts = torch.arange(rows, device=values.device).unsqueeze(1) * n
    # One place more than needed takes what unused places hold.
    places = torch.where(indices < n, starts + indices, rows * n)
    dense = values.new_zeros(rows * n + 1).scatter_(0, places.flatten(), values.flatten())
    return dense[:-1].view(rows, n)
