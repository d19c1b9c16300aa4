"""The sparse path in plain PyTorch: the mathematics, and the oracle of every test of it.

A *code* is a batch of rows of n latents of which few are active: `indices` (rows, C) int32, ascending,
with n in unused places; `active` (rows, C), the activations there, and `values`, what the code holds;
`counts` (rows,) int32, how many entries a row has, of which the first C are there.

From pre-activations z = pre + bias, a = z where z > threshold, else 0, and p = soft_topk(a, k, alpha)
over the whole row, whose zeros take part in the budget. With h and q = h / sum(h) as in reference.py an
entry is kept where a > 0 and (p >= 2^-24 or q >= 2^-24): the second clause matters for an integer k,
where the first element below the threshold has p near 0 and half of q. Its value is a p, or 0 where
p < 2^-24, so that exactly the active latents have values other than 0; straight-through it is a where the
hard mask is 1, else 0, and those of the mask are kept as well; of a hard code those alone, with the value a.

Every backend has the five functions below, with the same signatures, on 2-D tensors of unit stride along
the last dimension. What is computed is float64 for float64, else float32 (T below). k and alpha are
numbers or (rows,) tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtopk.backends.reference import (
    Densities,
    Solution,
    bad_rows,
    column,
    compute_dtype,
    densities,
    hard_topk_mask,
    scale_column,
    solve,
    tails,
)

SMALLEST = 2.0**-24  # of p and q


def code_forward(
    pre: Tensor,
    k: float | Tensor,
    alpha: float | Tensor | None,
    bias: Tensor | None,
    threshold: float | Tensor,
    mode: str,
    max_active: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """values, indices, active (rows, C), counts (rows,) and state (rows, 7) with C = max_active.

    pre (rows, n); bias (n,) of its dtype; threshold >= 0, a number or (n,) float32; mode "soft",
    "straight_through" or "hard", for which alpha and the state are None. The state is the solution with two
    sums over the elements that are not in the code, the *outside*, where a is 0 or q is tiny:

        Q_out = sum q,   M_out = sum q (a - anchor) / alpha,   anchor = r_B, or r_A where B is empty.

    A positive element above the threshold is in the code, so with an empty B the outside is the row's zeros
    and M_out = 0. A bad row (a NaN in z, k or alpha, alpha <= 0 or infinite) has one entry, a NaN at latent
    0, and a state of NaN.
    """
    dtype = compute_dtype(pre.dtype)
    z = (pre if bias is None else pre + bias).to(dtype)
    a = torch.where(z <= threshold, 0, z)  # NaN stays
    if mode == "hard":
        kept = hard_topk_mask(a, k) == 1
        bad = bad_rows(a, k)
        values = a
    else:
        scale = scale_column(alpha, a, dtype)
        row = solve(a, column(k, a, torch.float64), scale)
        factors = densities(row, scale)
        p, q, _ = weights(a, row, factors, scale)
        kept = (p >= SMALLEST) | (q >= SMALLEST)
        bad = row.D.isnan()
        values = torch.where(p < SMALLEST, 0, a * p)
        if mode == "straight_through":
            mask = hard_topk_mask(a, k) == 1
            kept, values = kept | mask, torch.where(mask, a, 0)

    first = torch.arange(pre.shape[1], device=pre.device) == 0
    kept = torch.where(bad, first, kept & (a > 0))
    indices, stored = compacted(kept, max_active)
    counts = kept.sum(1, dtype=torch.int32)
    a, values = torch.where(bad, torch.nan, a), torch.where(bad, torch.nan, values)
    at = [torch.nn.functional.pad(t, (0, 1)).gather(1, indices.long()) for t in (values, a)]
    if mode == "hard":
        return at[0], indices, at[1], counts, None

    q_out = torch.where(stored, 0, q)
    offset = torch.where(q_out == 0, 0, (a - anchor(row)) / scale)
    sums = [q_out.sum(1, keepdim=True), (q_out * offset).sum(1, keepdim=True)]
    state = torch.where(bad, torch.nan, torch.cat([*row, *sums], 1))
    return at[0], indices, at[1], counts, state


def compacted(kept: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """The indices (rows, places) int32 of the first kept elements of every row (rows, n), then n; and which
    elements those are, (rows, n) bool."""
    rows, n = kept.shape
    rank = kept.cumsum(1) - 1
    stored = kept & (rank < places)
    latents = torch.arange(n, dtype=torch.int32, device=kept.device).expand(rows, n)
    # One place more than needed takes the others.
    indices = torch.full((rows, places + 1), n, dtype=torch.int32, device=kept.device)
    return indices.scatter(1, torch.where(stored, rank, places), latents)[:, :places].contiguous(), stored


def weights(a: Tensor, row: Solution, factors: Densities, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and h of elements of solved rows."""
    above = a >= row.r_A
    e = tails(a, row.r_A, row.r_B, alpha)
    q = torch.where(above, factors.q_A, factors.q_B) * e
    h = torch.where(above, factors.h_A, factors.h_B) * e
    return torch.where(above, 1 - h, h), q, h


def anchor(row: Solution) -> Tensor:
    return torch.where(row.r_B == -torch.inf, row.r_A, row.r_B)


def code_backward(
    active: Tensor,
    values: Tensor | None,
    counts: Tensor,
    state: Tensor,
    alpha: float | Tensor,
    g: Tensor,
    selection_gradient: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_active (rows, C), grad_k and grad_alpha (rows,) from g (rows, C), the gradient of the values.

    With v = g a, the gradient of p, which is 0 outside the code,

        grad_a = g p + selection_gradient h (v - <q, v>) / alpha,   grad_k = <q, v>,
        grad_alpha = -R / alpha <q, (t - <q, t>) (v - <q, v>)>,   t = (a - b) / alpha,

    where q runs over the whole row. As in reference.py v and t are taken relative to a pivot, here the entry
    of the largest q or the outside, whichever has more of q: an outside pivot has v = 0 and t at the anchor.
    The outside enters with dv = -v_pivot, the same for all of it, so that no more of it is needed than

        sum q dv = -Q_out v_pivot,   sum q dt = M_out + Q_out (anchor - a_pivot) / alpha.

    `values`, given for a straight-through code, have the mask in the place of p in the first term. Places
    from counts on are not read, and are 0 in grad_active; a bad row is NaN in its entry, grad_k, grad_alpha.
    """
    scale = scale_column(alpha, active, active.dtype)
    row = Solution(*state[:, :5].split(1, 1))
    Q_out, M_out = state[:, 5:6], state[:, 6:7]
    factors = densities(row, scale)
    used = in_use(active, counts)
    a, g = torch.where(used, active, 0), torch.where(used, g, 0)
    p, q, h = weights(a, row, factors, scale)
    q, h = torch.where(used, q, 0), torch.where(used, h, 0)
    v = torch.where(q == 0, 0, g * a)

    first = q.argmax(1, keepdim=True)
    outside = Q_out > q.gather(1, first)
    v_pivot = torch.where(outside, 0, v.gather(1, first))
    a_pivot = torch.where(outside, anchor(row), a.gather(1, first))
    dv = torch.where(q == 0, 0, v - v_pivot)
    dt = torch.where(q == 0, 0, (a - a_pivot) / scale)
    sum_t_out = torch.where(Q_out == 0, 0, M_out + Q_out * ((anchor(row) - a_pivot) / scale))
    mean_v = (q * dv).sum(1, keepdim=True) - Q_out * v_pivot
    mean_t = (q * dt).sum(1, keepdim=True) + sum_t_out
    covariance = (q * (dt - mean_t) * (dv - mean_v)).sum(1, keepdim=True)
    covariance = covariance - (sum_t_out - Q_out * mean_t) * (v_pivot + mean_v)

    direct = g * (p if values is None else torch.where(used, values, 0) != 0)
    through = torch.where(h == 0, 0, h * (dv - mean_v) / scale)
    bad = row.D.isnan()
    grad_active = torch.where(used, torch.where(bad, torch.nan, direct + selection_gradient * through), 0)
    grad_k = torch.where(bad, torch.nan, v_pivot + mean_v)  # 0 where k was clamped: there q = 0
    grad_alpha = torch.where(factors.R == 0, 0, -factors.R * covariance / scale)
    return grad_active, grad_k.squeeze(1), torch.where(bad, torch.nan, grad_alpha).squeeze(1)


def in_use(places: Tensor, counts: Tensor) -> Tensor:
    """(rows, C) bool: the places of a code that hold an entry."""
    return torch.arange(places.shape[1], device=places.device) < counts.unsqueeze(1)


def transpose(indices: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A code by latent: offsets (n + 1,) and entries (rows * C,), both int32.

    entries[offsets[l]:offsets[l + 1]] are the places row * C + j of latent l, ascending; what lies behind
    offsets[n] is unspecified.
    """
    latents = torch.where(in_use(indices, counts), indices, n).flatten()
    ordered, entries = latents.sort(stable=True)
    starts = torch.arange(n + 1, device=indices.device, dtype=torch.int32)
    return torch.searchsorted(ordered, starts, out_int32=True), entries.int()


def decode(values: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """sum_j values_j weight[indices_j] + bias, (rows, d) in weight's dtype; weight (n, d), bias (d,).

    The sum is taken in T, in the order of the entries, and the bias added last.
    """
    used = in_use(values, counts)
    scale, latents = torch.where(used, values, 0), torch.where(used, indices, 0).long()
    out = values.new_zeros(len(values), weight.shape[1])
    for j in range(values.shape[1]):
        entry = scale[:, j : j + 1] * weight[latents[:, j]].to(values.dtype)
        out = out + torch.where(used[:, j : j + 1], entry, 0)
    if bias is not None:
        out = out + bias.to(values.dtype)
    return out.to(weight.dtype)


def latent_gradients(
    scale: Tensor,
    indices: Tensor,
    offsets: Tensor,
    entries: Tensor,
    y: Tensor,
    weight: Tensor | None,
    out_dtype: torch.dtype,
    want_sums: bool,
    want_squares: bool,
    project: bool = False,
    zero_silent: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Over the entries e of every latent l, in their order: grad[l] = sum scale_e y[row of e], and more.

    scale (rows, C) in T; indices (rows, C) of the code; offsets and entries as `transpose` gives them; y
    (rows, d). The results:

        grad (n, d) of out_dtype; a silent latent, one without entries, has a row of zeros or, without
            zero_silent, what torch.empty left there;
        dots (rows, C) in T, <weight[l], y[row of e]>, 0 in unused places: with a weight (n, d);
        sums (n,) in T, sum scale_e: with want_sums;
        squares (n,) in T, |grad[l]|^2 before it is rounded: with want_squares.

    `project` takes from grad[l] its part along weight[l], which has unit norm.
    """
    n, C, T = len(offsets) - 1, scale.shape[1], scale.dtype
    place = torch.arange(len(entries), device=scale.device, dtype=torch.int32)
    valid = place < offsets[n]
    latents = torch.searchsorted(offsets, place, right=True) - 1  # n behind the last entry
    entries = torch.where(valid, entries, 0).long()
    factor = torch.where(valid, scale.flatten()[entries], 0)
    rows = y.to(T)[entries // C]  # (rows * C, d)

    terms = torch.where(valid.unsqueeze(1), factor.unsqueeze(1) * rows, 0)
    grad = y.new_zeros(n + 1, y.shape[1], dtype=T).index_add(0, latents, terms)[:n]
    dots = None
    if weight is not None:
        products = (weight.to(T)[latents.clamp(max=n - 1)] * rows).sum(1)
        dots = scale.new_zeros(scale.numel() + 1)
        dots[torch.where(valid, entries, scale.numel())] = products
        dots = dots[:-1].view_as(scale)
        if project:
            grad = grad - (grad * weight.to(T)).sum(1, keepdim=True) * weight.to(T)
    sums = scale.new_zeros(n + 1).index_add(0, latents, factor)[:n] if want_sums else None
    squares = grad.square().sum(1) if want_squares else None
    grad = grad.to(out_dtype)
    if not zero_silent:
        silent = (offsets.diff() == 0).unsqueeze(1)
        grad = torch.where(silent, torch.empty_like(grad), grad)
    return grad, dots, sums, squares
