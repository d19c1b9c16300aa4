"""The sparse path: from pre-activations to the few active latents of every row, and from them to outputs.

    code = soft_topk_code(pre, k, alpha)             # selection: values = a p of the entries that are kept
    x_hat = sparse_decode(code, weight, bias)        # sum_j values_j weight[indices_j] + bias
    code = encode_soft_topk(x, W, b, k, alpha)       # selection of x W^T + b, with a sparse backward

where a = z for z = pre + bias above the threshold, else 0, and p = soft_topk(a, k, alpha); the formulas are
in backends/reference_sparse.py. The gradients of all weights come from one transposition of a code. With
check=False nothing waits for the device, and a step can be captured in a CUDA graph; the functions are not
traced by torch.compile, which runs them as they are between two graphs. Gradients are those of reverse mode,
once: forward mode and second derivatives raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtopk import dispatch
from softtopk.functional import Rows
from softtopk.sparse_autograd import Decode, Encode, Select, Selecting, Weighting, untraced
from softtopk.sparse_checks import (
    check_copy,
    check_decoder,
    check_flags,
    check_selection_gradient,
    check_squares,
    check_threshold,
    float_tensor,
    room,
)
from softtopk.sparse_code import SparseCode, Transposition


@untraced
def soft_topk_code(
    pre: Tensor,
    k: float | Tensor,
    alpha: float | Tensor = 0.1,
    *,
    bias: Tensor | None = None,
    threshold: float | Tensor = 0.0,
    hard: bool = False,
    max_active: int | None = None,
    selection_gradient: float = 1.0,
    check: bool = True,
    backend: str | None = None,
) -> SparseCode:
    """The code of relu(pre + bias) * soft_topk(relu(pre + bias), k, alpha), without its dense tensors.

    With a = z = pre + bias (rounded to pre's dtype) where z is above the threshold, else 0, and p the soft
    top-k of a whole row, whose zeros take part in the budget, the entries are those with a > 0 and p, or its
    share q of the gradient of k, at least 2^-24. Their value is a p, or 0 where p itself is below 2^-24.

    Args:
        pre: (..., n) float16, bfloat16, float32 or float64: the pre-activations.
        k, alpha: as in `soft_topk`: a number, or a tensor that broadcasts to pre.shape[:-1].
        bias: (n,), of any float dtype; taken in pre's.
        threshold: a number >= 0, or a float32 tensor (n,); no gradient. 0 makes the activation relu.
        hard: straight-through: the value is a for what `hard_topk` selects and 0 for other entries, and the
            gradients are the soft ones with the mask in the place of p.
        max_active: C, the places of a row, by default 32 ceil(k_max / 25.6) + 32 with k_max the largest k.
        selection_gradient: the part of a's gradient that comes through p is multiplied by this; 0 sends the
            gradient of the selection to k and alpha alone.
        check: look whether a row has more than C entries, and if so select again with room for it. False:
            the host does not wait for the device; such a row keeps its first C entries, see
            `SparseCode.overflow`. k as a tensor then needs max_active.
        backend: as in `soft_topk`.

    Returns:
        A code whose values, float64 for float64 and else float32, have gradients to pre, k, alpha and bias.
        That of pre is dense, of pre's dtype, and 0 where there is no entry; that of bias is its sum over the
        rows. A row with a NaN in pre + bias, k or alpha, or with alpha <= 0 or infinite in a tensor, has
        one entry, a NaN at latent 0; at +inf p = 1.

    Raises:
        ValueError: a number out of range, shapes or devices that do not fit, an unknown backend.
        TypeError: an argument of another type or dtype.
        softtopk.BackendUnavailable: the backend cannot run here; the message says why.

    >>> code = soft_topk_code(torch.tensor([[3.0, 1.0, 2.0, -1.0]]), 2)
    >>> code.to_dense()
    tensor([[3.0000, 0.0034, 1.9933, 0.0000]])
    """
    check_flags(hard=hard, check=check)
    rows = Rows(pre, -1, backend, "pre")
    k, alpha = flat(rows.budget(k)), flat(rows.scale(alpha))
    mode = "straight_through" if hard else "soft"
    how = selecting(rows, k, mode, threshold, max_active, selection_gradient, check, backend)
    return selected(rows, k, alpha, bias, how)


@untraced
def hard_topk_code(
    pre: Tensor,
    k: float | Tensor,
    *,
    bias: Tensor | None = None,
    threshold: float | Tensor = 0.0,
    max_active: int | None = None,
    check: bool = True,
    backend: str | None = None,
) -> SparseCode:
    """The code of the round-half-up(k) largest activations of every row that are above the threshold, ties
    to the lowest index: `hard_topk` of relu(pre + bias).

    Arguments, result and errors as of `soft_topk_code`; k has no gradient. A row with a NaN in pre + bias
    or k has one entry, a NaN at latent 0.
    """
    check_flags(check=check)
    rows = Rows(pre, -1, backend, "pre")
    k = flat(rows.budget(k))
    how = selecting(rows, k, "hard", threshold, max_active, 1.0, check, backend)
    return selected(rows, k, None, bias, how)


@untraced
def encode_soft_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: float | Tensor,
    alpha: float | Tensor = 0.1,
    *,
    threshold: float | Tensor = 0.0,
    hard: bool = False,
    max_active: int | None = None,
    selection_gradient: float = 1.0,
    check: bool = True,
    copy: Tensor | torch.dtype | None = None,
    squares: Tensor | None = None,
    sparse_gradient: bool = False,
    backend: str | None = None,
) -> SparseCode:
    """`soft_topk_code` of the pre-activations x weight^T + bias, without anything of their size in the
    backward: that takes the gradients of weight and bias from the entries alone.

    Args:
        x: (..., d), of the dtype of weight or, where there is one, of its copy.
        weight, bias: (n, d) and (n,) or None, with gradients of their own dtypes.
        copy: (n, d), the weight in another dtype, which is multiplied with in its place: so a trainer that
            keeps float32 weights and, beside them, a bfloat16 copy, casts neither in a step nor in a
            gradient. Or only that dtype: then a copy is made, and freed after its last use: here in the
            forward, in a decoder in the backward. The bias is cast, being short.
        squares: (n,) float32, filled by the backward with the squared norms of the rows of the weight's
            gradient (of this call's, if the weight is used elsewhere too), so that clipping need not read it.
        sparse_gradient: rows of the weight's gradient whose latent is in no code of the batch are left
            uninitialised. For an optimizer that skips them: such a gradient must not be added to another.
        k, alpha and the others: as in `soft_topk_code`.

    Returns:
        A code whose values have gradients to x, weight, bias, k and alpha.

    Raises:
        As `soft_topk_code`.
    """
    check_flags(hard=hard, check=check, sparse_gradient=sparse_gradient)
    mode = "straight_through" if hard else "soft"
    selection = (mode, threshold, max_active, selection_gradient, check)
    return encoded(x, weight, bias, k, alpha, selection, copy, squares, sparse_gradient, backend)


@untraced
def encode_hard_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: float | Tensor,
    *,
    threshold: float | Tensor = 0.0,
    max_active: int | None = None,
    check: bool = True,
    copy: Tensor | torch.dtype | None = None,
    squares: Tensor | None = None,
    sparse_gradient: bool = False,
    backend: str | None = None,
) -> SparseCode:
    """`hard_topk_code` of x weight^T + bias; arguments, gradients and errors as of `encode_soft_topk`."""
    check_flags(check=check, sparse_gradient=sparse_gradient)
    selection = ("hard", threshold, max_active, 1.0, check)
    return encoded(x, weight, bias, k, None, selection, copy, squares, sparse_gradient, backend)


@untraced
def sparse_decode(
    code: SparseCode,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    copy: Tensor | torch.dtype | None = None,
    project: bool = False,
    squares: Tensor | None = None,
    sparse_gradient: bool = False,
    backend: str | None = None,
) -> Tensor:
    """sum_j values_j weight[indices_j] + bias for every row of a code, summed in float32 (float64 for
    float64) in the order of the entries.

    Args:
        code: of shape (..., n).
        weight, bias: (n, d) and (d,) or None, with gradients of their own dtypes.
        copy, squares, sparse_gradient: as in `encode_soft_topk`.
        project: the weight's gradient without its component along each row of the weight (of its copy, if
            there is one), which must have unit norm.
        backend: as in `soft_topk`.

    Returns:
        (..., d) in the dtype of the copy, else of the weight, with gradients to code.values, weight and
        bias. The gradients of the values and of the weight come out of one pass over the entries by latent.

    Raises:
        As `soft_topk_code`.
    """
    check_flags(project=project, sparse_gradient=sparse_gradient)
    if not isinstance(code, SparseCode):
        raise TypeError(f"code must be a softtopk.SparseCode, not {type(code).__name__}")
    check_decoder(code.values, "code", code.shape[-1], weight, "bias", bias, copy, squares)
    kernels = dispatch.sparse_kernels(backend, code.device)
    used = multiplied(weight, copy)
    how = Weighting(kernels, project, squares, sparse_gradient, code.transposition)
    out = Decode.apply(code.values, weight, bias, used, code.indices, code.counts, how)
    return out.view(*code.shape[:-1], weight.shape[1])


@untraced
def soft_topk_decode(
    pre: Tensor,
    k: float | Tensor,
    alpha: float | Tensor,
    weight: Tensor,
    decoder_bias: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    threshold: float | Tensor = 0.0,
    hard: bool = False,
    max_active: int | None = None,
    selection_gradient: float = 1.0,
    check: bool = True,
    copy: Tensor | torch.dtype | None = None,
    project: bool = False,
    squares: Tensor | None = None,
    sparse_gradient: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, SparseCode]:
    """`soft_topk_code` and `sparse_decode` of its result: the output (..., d) and the code.

    Arguments, results and errors as theirs; `bias` belongs to pre, `decoder_bias` (d,) to the output.
    """
    check_flags(project=project, sparse_gradient=sparse_gradient)
    n = Rows(pre, -1, backend, "pre").n
    check_decoder(pre, "pre", n, weight, "decoder_bias", decoder_bias, copy, squares)
    code = soft_topk_code(
        pre,
        k,
        alpha,
        bias=bias,
        threshold=threshold,
        hard=hard,
        max_active=max_active,
        selection_gradient=selection_gradient,
        check=check,
        backend=backend,
    )
    x_hat = sparse_decode(
        code,
        weight,
        decoder_bias,
        copy=copy,
        project=project,
        squares=squares,
        sparse_gradient=sparse_gradient,
        backend=backend,
    )
    return x_hat, code


def flat(value: float | Tensor) -> float | Tensor:
    """A value for every row, (...), as (rows,)."""
    return value.reshape(-1) if isinstance(value, Tensor) else value


def multiplied(weight: Tensor, copy: Tensor | torch.dtype | None) -> Tensor:
    """What stands for a weight in its products."""
    if isinstance(copy, Tensor):
        return copy
    return weight.detach() if copy is None else weight.detach().to(copy)


def selecting(rows: Rows, k, mode, threshold, max_active, selection_gradient, check, backend) -> Selecting:
    """The checked options of a selection among rows.n latents."""
    threshold = check_threshold(threshold, rows.n, rows.x, rows.name)
    selection_gradient = check_selection_gradient(selection_gradient)
    kernels = dispatch.sparse_kernels(backend, rows.x.device)
    places = room(k, max_active, rows.n, check)
    transposition = Transposition(kernels, rows.n)
    return Selecting(kernels, mode, threshold, places, check, selection_gradient, transposition)


def selected(rows: Rows, k, alpha, bias: Tensor | None, how: Selecting) -> SparseCode:
    if bias is not None:
        float_tensor("bias", bias, (rows.n,), rows.x, "pre")
    shape = rows.x.shape
    pre = rows.x if len(shape) == 2 else rows.x.reshape(shape[:-1].numel(), rows.n)
    return SparseCode(*Select.apply(pre, bias, k, alpha, how), shape, how.transposition)


def encoded(x, weight, bias, k, alpha, selection, copy, squares, sparse_gradient, backend) -> SparseCode:
    given = Rows(x, -1, backend)
    float_tensor("weight", weight, (None, given.n), x, "x")
    n = len(weight)
    if n == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: at least one latent is needed")
    if bias is not None:
        float_tensor("bias", bias, (n,), x, "x")
    check_squares(squares, n, x, "x")
    check_copy(copy, weight, x, "x")
    used = multiplied(weight, copy)
    if used.dtype != x.dtype:
        name = "weight" if copy is None else "copy"
        raise TypeError(f"x has dtype {x.dtype}, {name} {used.dtype}; they must be the same (see copy)")
    given.n = n  # the budget is one of the latents, not of the elements of x
    k = flat(given.budget(k))
    alpha = None if alpha is None else flat(given.scale(alpha))
    how = selecting(given, k, *selection, backend)
    of_weight = Weighting(how.kernels, False, squares, sparse_gradient, how.transposition)
    shape = x.shape
    x = x if len(shape) == 2 else x.reshape(shape[:-1].numel(), shape[-1])
    parts = Encode.apply(x, weight, bias, k, alpha, used, how, of_weight)
    return SparseCode(*parts, (*shape[:-1], n), how.transposition)
