"""A dense step forward and backward in parts of its batch, each done before the next begins.

A dense pass makes half a dozen matrices (B, n), and its backward needs most of them at once. Where a row is
selected by itself (`Selector.by_rows`) a part of the rows can be taken through all of it at a time, and the
parts' gradients added up: the same sums in another order. What concerns the whole batch, budgets and losses
of them, is made for all rows before and derived after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softsae import losses
from softsae.schedules import Phase
from softsae.selectors.contract import Selection
from softsae.sparse import Sparse, centered, encoder_bias
from softtopk.activity import Activity, activity
from softtopk.backends.projection import add_product, multiply
from softtopk.backends.reference import compute_dtype

if TYPE_CHECKING:
    from softsae.autoencoder import SparseAutoencoder

# Of a part's matrix (rows, n), of which there are up to five at a time. In a development run on an H200, at
# B = 8192, d = 512, n = 4096, a step took 1.68 | 1.52 | 1.36 | 1.22 ms with 8 | 12 | 16 | 32 MiB and had 143
# | 159 | 185 | 269 MiB beside its state, each the first step of its process. (Of 16 MiB, where others had
# trained before in the process, benchmarks/results/step-h200.json has 153.)
PART_BYTES = 16 << 20
# Rows of a part, times d: of fewer, adding up the gradients (n, d) would be a good part of the work.
ROWS_PER_WIDTH = 2


class Derivable(NamedTuple):
    """A tensor and the gradient that is to be propagated from it, None for 1."""

    tensor: Tensor
    gradient: Tensor | None = None


class Passed(NamedTuple):
    """A training pass. reconstruction (B, d_out), normalised, and k_hat (B,) without gradient; losses by
    name, those that are not derived yet with theirs; overflow as of `Output`; what was active; pending: what
    is still to be derived besides the losses."""

    reconstruction: Tensor
    k_hat: Tensor
    losses: dict[str, Tensor]
    overflow: Tensor | None
    activity: Activity
    pending: tuple[Derivable, ...] = ()


def whole(
    sae: SparseAutoencoder, x: Tensor, target: Tensor | None, phase: Phase, how: Sparse | None
) -> Passed:
    """A pass of a whole batch, dense or sparse, of which nothing is derived yet."""
    out = sae(x, phase, target, how=how)
    found = activity(out.selected)
    return Passed(out.reconstruction.detach(), out.k_hat.detach(), dict(out.losses), out.overflow, found)


def rows_at_a_time(
    sae: SparseAutoencoder, phase: Phase, samples: int, dtype: torch.dtype, wanted: int | None
) -> int:
    """The rows of a part of a batch of so many samples: as many as `wanted` or, if that is None, as seem
    best; all of them where the rule does not decide by rows or the loss is none of rows."""
    if phase.regularizer is not None or sae.config.matryoshka is not None or not sae.selector.by_rows(phase):
        return samples
    if wanted is None:
        wanted = max(PART_BYTES // (sae.config.n * dtype.itemsize), ROWS_PER_WIDTH * sae.config.d)
    parts = -(-samples // max(wanted, 1))
    return -(-samples // max(parts, 1))


def in_parts(
    sae: SparseAutoencoder,
    x: Tensor,
    target: Tensor | None,
    phase: Phase,
    weights: Mapping[str, float | Tensor],
    rows: int,
    dtype: torch.dtype,
) -> Passed:
    """A dense pass of x (B, d) by so many rows at a time. What concerns a row is derived: the gradients of
    W_enc, W_dec and b_dec are there.

    weights: of the loss terms by name, 1 where a name is missing. dtype: of the products.
    """
    normalised, sparse = sae.rows(x), Sparse(dtype=dtype)
    inputs = centered(sae, normalised, sparse)
    k_hat = sae.selector.row_budgets(sae, normalised, phase, sparse, inputs)
    starts = range(0, len(x), rows)
    shares = normalised.new_full((len(starts),), rows / len(x))  # of the parts in a mean over all rows
    shares[-1].fill_((len(x) - starts[-1]) / len(x))
    seeds = shares * weights["reconstruction"] if "reconstruction" in weights else shares
    del normalised
    bias = encoder_bias(sae)
    encoder, decoder = Layer(sae.W_enc, bias, dtype), Layer(sae.W_dec, sae.b_dec, dtype)
    parts = []
    for start, seed in zip(starts, seeds.unbind(), strict=True):
        at = slice(start, start + rows)
        budgets = None if k_hat is None else k_hat.detach()[at].requires_grad_(k_hat.requires_grad)
        wanted = None if target is None else target[at]
        parts.append(derived(sae, x[at], wanted, inputs[at], budgets, phase, encoder, decoder, seed))
    sae.W_dec.grad, sae.b_dec.grad = decoder.gradients(sae.W_dec, sae.b_dec)
    sae.W_enc.grad, of_bias = encoder.gradients(sae.W_enc, bias)
    x_hats, used, terms, found, of_budgets = zip(*parts, strict=True)
    used = torch.cat(used)
    pending = [] if of_bias is None else [Derivable(bias, of_bias)]
    if k_hat is not None and k_hat.requires_grad:
        pending.append(Derivable(k_hat, torch.cat(of_budgets)))
    terms = {"reconstruction": (shares * torch.stack(terms)).sum()}
    terms |= sae.selector.loss_terms(sae, None, Selection(None, used if k_hat is None else k_hat), phase)
    return Passed(torch.cat(x_hats), used, terms, None, together(found), tuple(pending))


class Part(NamedTuple):
    """What is left of a part: without gradient its reconstruction, budgets and loss; what was active in it;
    the gradient of budgets that it was given."""

    x_hat: Tensor
    k_hat: Tensor
    loss: Tensor
    activity: Activity
    of_budgets: Tensor | None


def derived(
    sae: SparseAutoencoder,
    x: Tensor,
    target: Tensor | None,
    inputs: Tensor,
    budgets: Tensor | None,
    phase: Phase,
    encoder: Layer,
    decoder: Layer,
    seed: Tensor,
) -> Part:
    """The forward and the backward of a part x (rows, d), whose centred rows are the inputs, from the
    gradient of its loss on."""
    rows = sae.rows(x)
    anchor = seed.new_empty((), requires_grad=True)
    pre = Encoded.apply(anchor, inputs, encoder)
    selection = sae.selector(sae, rows, pre, phase, *([] if budgets is None else [budgets]))
    x_hat = Decoded.apply(anchor, selection.latents, decoder)
    found, k_hat = activity(selection.latents.detach()), selection.k_hat.detach()
    del pre, selection  # or they would be there throughout the backward
    loss = losses.reconstruction(sae.target_rows(x, rows, target), x_hat)
    loss.backward(seed)
    return Part(x_hat.detach(), k_hat, loss.detach(), found, None if budgets is None else budgets.grad)


def derive(loss: Tensor, pending: tuple[Derivable, ...]):
    """The backward of a loss and, at once, of what is pending: what meets in a tensor is added up first."""
    roots = [root for root in (Derivable(loss), *pending) if root.tensor.requires_grad]
    if roots:
        torch.autograd.backward(*zip(*roots, strict=True))


def together(found: tuple[Activity, ...]) -> Activity:
    """Of all parts."""
    fired, active, entries, most = (torch.stack(values) for values in zip(*found, strict=True))
    return Activity(fired.any(0), active.sum(), entries.sum(), most.max())


class Layer:
    """A weight (n, d) and a bias in the dtype of the products, and the sums of their gradients."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype):
        self.weight, self.bias = weight.detach().to(dtype), bias.detach().to(dtype)
        self.of_weight: Tensor | None = None
        self.of_bias: list[Tensor] = []  # of the parts

    def add(self, a: Tensor, b: Tensor, g: Tensor):
        """Add a^T b (n, d) to the weight's gradient, and the sum of g's rows to the bias's."""
        dtype = compute_dtype(g.dtype)
        if self.of_weight is None:
            self.of_weight = multiply(a.t(), b, torch.empty_like(self.weight, dtype=dtype))
        else:
            add_product(self.of_weight, a.t(), b)
        self.of_bias.append(g.sum(0, dtype=dtype))

    def gradients(self, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """In the dtypes of a weight and a bias; None where no part had any."""
        if self.of_weight is None:
            return None, None
        return self.of_weight.to(weight.dtype), torch.stack(self.of_bias).sum(0).to(bias.dtype)


class Encoded(torch.autograd.Function):
    """Rows x (rows, d) -> x W^T + b (rows, n). The gradients stay in the layer: the anchor, a tensor with a
    gradient, is what autograd hangs it on."""

    @staticmethod
    def forward(ctx, anchor, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return torch.addmm(layer.bias, x, layer.weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        ctx.layer.add(g, x, g)
        return None, None, None


class Decoded(torch.autograd.Function):
    """Latents (rows, n) -> latents W + b (rows, d), whose gradients stay in the layer, as in `Encoded`."""

    @staticmethod
    def forward(ctx, anchor, latents, layer):
        ctx.save_for_backward(latents)
        ctx.layer = layer
        return torch.addmm(layer.bias, latents, layer.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (latents,) = ctx.saved_tensors
        ctx.layer.add(latents, g, g)
        return None, g @ ctx.layer.weight.t() if ctx.needs_input_grad[1] else None, None
