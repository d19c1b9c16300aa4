"""The sparse path of an autoencoder: codes in place of latents (B, n).

    code = encode(sae, x, ...)        # the product with W_enc and its selection in one
    x_hat = decode(sae, code, ...)    # a gather of rows of W_dec

Both have gradients without anything of size (B, n). In training with bfloat16 products weights are rounded
for the time of their use, or have copies that are multiplied with in their place, and squared row norms of
the weights' gradients are left behind for the clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softsae.losses import reconstruction
from softtopk import SparseCode, encode_hard_topk, encode_soft_topk, sparse_decode
from softtopk.shift import shifted
from softtopk.sparse_autograd import Weighting, weight_gradient
from softtopk.sparse_code import Transposition

if TYPE_CHECKING:
    from softsae.autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class Sparse:
    """How a sparse pass is made.

    max_active: the places of a row; None takes what the budget needs. check: whether the host looks, and
    waits, for rows that need more; else the codes say so (`SparseCode.overflow`). dtype: of the products
    with weights; None takes the weights' own. copies: of weights (n, d) by name, in that dtype, that are
    there already. squares: (n,) float32 buffers by the same names, which a backward fills with the squared
    norms of the rows of the weights' gradients. project: whether W_dec's gradient loses what is parallel to
    each row.
    """

    max_active: int | None = None
    check: bool = True
    dtype: torch.dtype | None = None
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    project: bool = False

    def of(self, name: str) -> dict[str, Tensor | torch.dtype | None]:
        """The options `copy` and `squares` of a weight."""
        squares = self.squares.get(name) if torch.is_grad_enabled() else None
        return {"copy": self.copies.get(name, self.dtype), "squares": squares}

    def shifted(self, x: Tensor, center: Tensor) -> Tensor:
        """x - center in the dtype that weights are multiplied in."""
        return shifted(x, center, dtype=self.dtype)


def places(k: float) -> int:
    """The places of a row with room for a budget of k: a quarter more and 32, in whole 32s."""
    return 32 * math.ceil(1.25 * k / 32) + 32


def encode(
    sae: SparseAutoencoder,
    x: Tensor,
    sparse: Sparse,
    k: float | Tensor,
    alpha: float | Tensor | None = None,
    rows: Tensor | None = None,
    **options,
) -> SparseCode:
    """The code of normalised rows x (B, d): soft at an alpha (or straight-through, hard=True), else hard.

    rows: `centered` of x, where that is there already. Options: of softtopk.encode_soft_topk and
    encode_hard_topk.
    """
    rows, bias = inputs(sae, x, sparse, rows)
    options = {"max_active": sparse.max_active, "check": sparse.check, **sparse.of("W_enc"), **options}
    if alpha is None:
        return encode_hard_topk(rows, sae.W_enc, bias, k, **options)
    return encode_soft_topk(rows, sae.W_enc, bias, k, alpha, **options)


def centered(sae: SparseAutoencoder, x: Tensor, sparse: Sparse) -> Tensor:
    """What W_enc is multiplied with for normalised rows x (B, d): a constant."""
    return sparse.shifted(x, sae.center.detach())


def inputs(
    sae: SparseAutoencoder, x: Tensor, sparse: Sparse, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What W_enc is multiplied with, and the bias, for normalised rows x (B, d)."""
    return centered(sae, x, sparse) if rows is None else rows, encoder_bias(sae)


def encoder_bias(sae: SparseAutoencoder) -> Tensor:
    """b_enc (n,) with the gradient of the centre, too."""
    if torch.is_grad_enabled() and sae.center.requires_grad:
        return sae.b_enc + CenterGradient.apply(sae.center, sae.W_enc.detach())
    return sae.b_enc


def learning(sae: SparseAutoencoder, x: Tensor, code: SparseCode, sparse: Sparse) -> SparseCode:
    """A hard code of normalised rows x (B, d) that was made without gradient, with that of `encode`.

    For a rule that chooses among the entries of a larger code: the gradients are sums over what it keeps.
    """
    rows, bias = inputs(sae, x, sparse)
    squares = sparse.of("W_enc")["squares"]
    return code.with_values(EncoderGradient.apply(code.values, rows, sae.W_enc, bias, code, squares))


def decode(sae: SparseAutoencoder, code: SparseCode, sparse: Sparse) -> Tensor:
    """Normalised reconstruction (B, d_out) of a code."""
    return sparse_decode(code, sae.W_dec, sae.b_dec, project=sparse.project, **sparse.of("W_dec"))


class EncoderGradient(torch.autograd.Function):
    """The values of a code as they are, as a function of the encoder's weight and bias (of x it is not)."""

    @staticmethod
    def forward(ctx, values, x, W, bias, code, squares):
        ctx.save_for_backward(x)
        ctx.code, ctx.squares, ctx.dtypes = code, squares, (W.dtype, bias.dtype)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        (x,), code, (dtype, bias_dtype) = ctx.saved_tensors, ctx.code, ctx.dtypes
        how = Weighting(code.transposition.kernels, False, ctx.squares, False, code.transposition)
        of_W, _, sums = weight_gradient(
            how, code.indices, code.counts, gradient.contiguous(), x, None, dtype, True
        )
        return None, None, of_W, sums.to(bias_dtype), None, None


class CenterGradient(torch.autograd.Function):
    """Zeros (n,) to be added to the bias of an encoder W (x - center): the centre's gradient, -W^T of the
    bias's, where the one through x would cost a product of (B, n) with (n, d)."""

    @staticmethod
    def forward(ctx, center, W):
        ctx.save_for_backward(W)
        return center.new_zeros(len(W))

    @staticmethod
    def backward(ctx, gradient):
        (W,) = ctx.saved_tensors
        return -(gradient.to(W.dtype) @ W).to(gradient.dtype), None


def decode_groups(
    sae: SparseAutoencoder, code: SparseCode, group: Tensor, groups: int, sparse: Sparse
) -> list[Tensor]:
    """Normalised reconstructions (B, d_out) from the groups up to 0, 1 ... groups - 1 of a code's entries.

    group (B, C): the group of each entry, `groups` or more for entries that no group has. All are decoded
    at once, as rows of one code, so that W_dec has one gradient.
    """
    apart = separated(code, group, groups)
    parts = sparse_decode(apart, sae.W_dec, None, project=sparse.project, **sparse.of("W_dec"))
    parts = parts.view(-1, groups, parts.shape[1]).unbind(1)
    sums = [parts[0] + sae.b_dec]
    for part in parts[1:]:
        sums.append(sums[-1] + part)
    return sums


def nested_reconstruction(
    sae: SparseAutoencoder, target: Tensor, code: SparseCode, ends: Sequence[int], sparse: Sparse
) -> tuple[Tensor, Tensor]:
    """`losses.nested_reconstruction` of a code, and the reconstruction (B, d_out) from all latents."""
    group = sum((code.indices >= end).int() for end in ends[:-1])
    sums = decode_groups(sae, code, group, len(ends), sparse)
    return torch.stack([reconstruction(target, x_hat) for x_hat in sums]).mean(), sums[-1]


def separated(code: SparseCode, group: Tensor, groups: int) -> SparseCode:
    """A code of B * groups rows: row b * groups + g has the entries of row b that are in group g."""
    rows, places = code.indices.shape
    n = code.shape[-1]
    used = torch.arange(places, device=code.device) < code.counts.unsqueeze(1)
    group = torch.where(used, group, groups).clamp(max=groups).long()
    member = group.unsqueeze(1) == torch.arange(groups, device=code.device).unsqueeze(1)  # (B, groups, C)
    rank = member.cumsum(2, dtype=torch.int32) - 1
    nowhere = groups * places  # takes the entries that no group has
    own = rank.gather(1, group.clamp(max=groups - 1).unsqueeze(1)).squeeze(1)
    place = torch.where(group < groups, group * places + own, nowhere)
    values = code.values.new_zeros(rows, nowhere + 1).scatter(1, place, code.values)[:, :-1]
    indices = code.indices.new_full((rows, nowhere + 1), n).scatter(1, place, code.indices)[:, :-1]
    return SparseCode(
        values.reshape(rows * groups, places).contiguous(),
        indices.reshape(rows * groups, places).contiguous(),
        member.sum(2, dtype=torch.int32).flatten(),
        (rows * groups, n),
        Transposition(code.transposition.kernels, n),
    )


def shaped(code: SparseCode, shape: Sequence[int]) -> SparseCode:
    """The same code of latents of another shape (..., n)."""
    return SparseCode(code.values, code.indices, code.counts, tuple(shape), code.transposition)


def only(code: SparseCode, kept: Tensor) -> SparseCode:
    """The code of the entries for which `kept` (B, C) is True."""
    return separated(code, torch.where(kept, 0, 1), 1)
