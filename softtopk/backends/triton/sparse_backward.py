"""The gradients of a sparse code's activations, k and alpha in Triton, one program per row of entries.

The entries are read two or three times, from the cache all but once; they are few.
The first place to look: `code_backward` of backends/reference_sparse.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.triton import launch
from softtopk.backends.triton.solve import densities
from softtopk.backends.triton.sweeps import INF, LN_2, exponent, per_row, scale_in, sums, tails


@triton.jit
def entries_at(active, g, place, number, r_A, r_B, q_A, q_B, scale, rate):
    """a, g, q, exp(-|a - r| / alpha) and v = g a of a row's entries; 0 beyond the last."""
    used = place < number
    a = tl.load(active + place, mask=used, other=0)
    gradient = tl.load(g + place, mask=used, other=0)
    e = tails(a, r_A, r_B, scale, rate)
    q = tl.where(used, tl.where(a >= r_A, q_A, q_B) * e, 0)
    return a, gradient, q, e, tl.where(q == 0, 0, gradient * a)


@triton.jit(do_not_specialize=["places", "alpha_bits", "selection_bits"])
def code_backward_kernel(
    active, values, counts, state, alpha, alpha_stride, alpha_bits: tl.int64, g, selection_bits: tl.int64,
    grad_active, grad_k, grad_alpha, places,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T: tl.constexpr = active.dtype.element_ty
    active += row * places
    g += row * places
    grad_active += row * places
    number = tl.minimum(tl.load(counts + row), places)
    solved = state + row * 7
    r_A = tl.load(solved)
    r_B = tl.load(solved + 1)
    P = tl.load(solved + 2)
    Q = tl.load(solved + 3)
    D = tl.load(solved + 4)
    Q_out = tl.load(solved + 5)
    M_out = tl.load(solved + 6)
    alpha_row = scale_in(per_row(alpha, alpha_stride, alpha_bits, row), T)
    scale, rate = exponent(alpha_row, T)
    slope = rate * LN_2  # 1 / alpha = scale * slope
    R, q_A, q_B = densities(r_A, r_B, P, Q, D, alpha_row)
    part_of_selection = per_row(None, 0, selection_bits, row).to(T)

    # The pivot: the entry of the largest q, which is one of the nearest to the threshold, or the outside.
    most = tl.full([BLOCK], -1, T)
    first = tl.zeros([BLOCK], tl.int32)
    start = tl.zeros((), tl.int32)
    while start < number:
        place = start + tl.arange(0, BLOCK)
        _, _, q, _, _ = entries_at(active, g, place, number, r_A, r_B, q_A, q_B, scale, rate)
        larger = (q > most) & (place < number)
        most = tl.where(larger, q, most)
        first = tl.where(larger, place, first)
        start += BLOCK
    largest = tl.max(most)
    pivot = tl.min(tl.where(most == largest, first, places))
    inside = (largest > 0) & (Q_out <= largest)
    anchor = tl.where(r_B == -INF, r_A, r_B)
    a_pivot = tl.load(active + pivot, mask=inside, other=0)
    v_pivot = a_pivot * tl.load(g + pivot, mask=inside, other=0)
    a_pivot = tl.where(inside, a_pivot, anchor)

    part_v = tl.zeros([BLOCK], T)
    part_t = tl.zeros([BLOCK], T)
    start = tl.zeros((), tl.int32)
    while start < number:
        place = start + tl.arange(0, BLOCK)
        a, _, q, _, v = entries_at(active, g, place, number, r_A, r_B, q_A, q_B, scale, rate)
        part_v += q * tl.where(q == 0, 0, v - v_pivot)
        part_t += q * tl.where(q == 0, 0, (a - a_pivot) * scale * slope)
        start += BLOCK
    mean_v, mean_t = sums(part_v, part_t)
    mean_v -= Q_out * v_pivot
    t_out = tl.where(Q_out == 0, 0, M_out + Q_out * ((anchor - a_pivot) * scale * slope))
    mean_t += t_out

    products = tl.zeros([BLOCK], T)
    bad = D != D
    start = tl.zeros((), tl.int32)
    while start < places:
        place = start + tl.arange(0, BLOCK)
        a, gradient, q, e, v = entries_at(active, g, place, number, r_A, r_B, q_A, q_B, scale, rate)
        counted = q > 0
        dv = tl.where(counted, v - v_pivot - mean_v, 0)
        dt = tl.where(counted, (a - a_pivot) * scale * slope - mean_t, 0)
        products += q * dt * dv
        if values is None:
            h = tl.where(a >= r_A, R * q_A, R * q_B) * e
            direct = gradient * tl.where(a >= r_A, 1 - h, h)
        else:
            value = tl.load(values + row * places + place, mask=place < number, other=0)
            direct = tl.where(value != 0, gradient, 0)
        # In an order that neither overflows nor underflows.
        through = tl.where(R * q == 0, 0, (R * q * scale) * (dv * slope))
        gradient = tl.where(bad, float("nan"), direct + part_of_selection * through)
        gradient = tl.where(place < number, gradient, 0)
        tl.store(grad_active + place, gradient, mask=place < places)
        start += BLOCK
    covariance = tl.sum(products) - (t_out - Q_out * mean_t) * (v_pivot + mean_v)

    to_k = v_pivot + mean_v  # 0 where k was clamped: there q = 0
    to_alpha = tl.where(R == 0, 0, -(R * scale) * (covariance * slope))
    tl.store(grad_k + row, tl.where(bad, float("nan"), to_k))
    tl.store(grad_alpha + row, tl.where(bad, float("nan"), to_alpha))


def code_backward(
    active: Tensor,
    values: Tensor | None,
    counts: Tensor,
    state: Tensor,
    alpha: float | Tensor,
    g: Tensor,
    selection_gradient: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_active (rows, C), grad_k and grad_alpha (rows,)."""
    rows, places = active.shape
    grad_active = torch.empty_like(active)
    grad_k, grad_alpha = (active.new_empty((rows,)) for _ in range(2))
    if rows > 0:
        block = min(max(32, triton.next_power_of_2(places)), 1024)
        arguments = (
            active, values, counts, state, *launch.per_row(alpha), g.contiguous(),
            launch.bits(selection_gradient), grad_active, grad_k, grad_alpha, places,
        )  # fmt: skip
        with launch.on_device(active):
            # Where some differences v - v_pivot were fused with the product that v is and others not, what
            # cancels between them would be left over, divided by alpha.
            options = dict(num_warps=max(1, block // 128), enable_fp_fusion=False)
            code_backward_kernel[(rows,)](*arguments, BLOCK=block, **options)
    return grad_active, grad_k, grad_alpha
