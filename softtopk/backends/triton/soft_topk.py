"""soft_topk forward and backward in Triton, one program per row.

Bytes: the forward reads x and writes p, the backward reads x and v and writes grad_x, once each
where a row fits into registers (launch.RESIDENT_BYTES); a longer row is read again in every sweep.
The first place to look: softtopk/backends/reference.py, the same in plain PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.reference import compute_dtype
from softtopk.backends.triton import launch
from softtopk.backends.triton.solve import (
    LN_2,
    chunk,
    densities,
    exponent,
    per_row,
    read,
    solve,
    tails,
)


@triton.jit(do_not_specialize=["k_bits", "alpha_bits"])
def forward_kernel(
    x, x_stride, k, k_stride, k_bits: tl.int64, alpha, alpha_stride, alpha_bits: tl.int64,
    p, solution, n,
    LARGEST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pointer = x + row * x_stride
    tile = read(pointer, 0, n, LARGEST, BLOCK, T)
    budget = per_row(k, k_stride, k_bits, row)
    a = per_row(alpha, alpha_stride, alpha_bits, row)
    scale, rate = exponent(a, T)
    r_A, r_B, P, Q, D = solve(tile, pointer, n, budget, a.to(T), scale, rate, LARGEST, CHUNKS, BLOCK)
    out = solution + row * 5
    tl.store(out, r_A)
    tl.store(out + 1, r_B)
    tl.store(out + 2, P)
    tl.store(out + 3, Q)
    tl.store(out + 4, D)

    R, q_A, q_B = densities(r_A, r_B, P, Q, D, a)
    h_A = R * q_A
    h_B = R * q_B
    for start in range(0, CHUNKS * BLOCK, BLOCK):
        values = chunk(tile, pointer, start, n, LARGEST, CHUNKS, BLOCK)
        e = tails(values, r_A, r_B, scale, rate)
        weight = tl.where(values >= r_A, 1 - h_A * e, h_B * e)
        weight = tl.where(D == D, weight, float("nan"))
        i = start + tl.arange(0, BLOCK)
        tl.store(p + row * n + i, weight.to(p.dtype.element_ty), mask=i < n)


def soft_topk_forward(
    x: Tensor, k: float | Tensor, alpha: float | Tensor, largest: bool = True, form: str = "p"
) -> tuple[Tensor, Tensor]:
    """p (rows, n) in x's dtype, and the solution (rows, 5) in the compute dtype."""
    rows, n = x.shape
    dtype = compute_dtype(x.dtype)
    p = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    solution = torch.empty((rows, 5), dtype=dtype, device=x.device)
    if rows == 0:
        return p, solution
    x = launch.rows_of(x)
    tile = launch.tile(n, dtype)
    with launch.on_device(x):
        forward_kernel[(rows,)](
            x, x.stride(0), *launch.per_row(k), *launch.per_row(alpha), p, solution, n,
            LARGEST=largest, T=launch.triton_dtype(dtype), **tile._asdict(),
        )  # fmt: skip
    return p, solution


@triton.jit(do_not_specialize=["alpha_bits"])
def backward_kernel(
    x, x_stride, solution, alpha, alpha_stride, alpha_bits: tl.int64, v, v_stride,
    grad_x, grad_k, grad_alpha, n,
    LARGEST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row * x_stride
    v_row = v + row * v_stride
    x_tile = read(x_row, 0, n, LARGEST, BLOCK, T)
    v_tile = read(v_row, 0, n, True, BLOCK, T)
    r_A = tl.load(solution + row * 5)
    r_B = tl.load(solution + row * 5 + 1)
    P = tl.load(solution + row * 5 + 2)
    Q = tl.load(solution + row * 5 + 3)
    D = tl.load(solution + row * 5 + 4)
    a = per_row(alpha, alpha_stride, alpha_bits, row)
    scale, rate = exponent(a, T)
    R, q_A, q_B = densities(r_A, r_B, P, Q, D, a)

    # The largest q is at r_A or r_B; the pivot is the first such element. Without one, v = 0 will do.
    top_A = tl.where(q_A >= q_B, r_A, float("nan"))
    top_B = tl.where(q_B >= q_A, r_B, float("nan"))
    pivot = tl.zeros((), tl.int32) + n
    for start in range(0, CHUNKS * BLOCK, BLOCK):
        values = chunk(x_tile, x_row, start, n, LARGEST, CHUNKS, BLOCK)
        i = start + tl.arange(0, BLOCK)
        top = (values == top_A) | (values == top_B)
        pivot = tl.minimum(pivot, tl.min(tl.where(top, i, n)))
    v_pivot = tl.load(v_row + pivot, mask=pivot < n, other=0).to(T)
    x_pivot = tl.where(q_A >= q_B, r_A, r_B)

    # t is in units of alpha ln 2: the base of `rate`.
    slope = rate * LN_2  # 1 / alpha = scale * slope, which as one number may overflow
    mean_v = tl.zeros((), T)
    mean_t = tl.zeros((), T)
    for start in range(0, CHUNKS * BLOCK, BLOCK):
        values = chunk(x_tile, x_row, start, n, LARGEST, CHUNKS, BLOCK)
        incoming = chunk(v_tile, v_row, start, n, True, CHUNKS, BLOCK)
        q = tl.where(values >= r_A, q_A, q_B) * tails(values, r_A, r_B, scale, rate)
        mean_v += tl.sum(tl.where(q == 0, 0, q * (incoming - v_pivot)))
        mean_t += tl.sum(tl.where(q == 0, 0, q * ((values - x_pivot) * scale * rate)))

    covariance = tl.zeros((), T)
    for start in range(0, CHUNKS * BLOCK, BLOCK):
        values = chunk(x_tile, x_row, start, n, LARGEST, CHUNKS, BLOCK)
        incoming = chunk(v_tile, v_row, start, n, True, CHUNKS, BLOCK)
        q = tl.where(values >= r_A, q_A, q_B) * tails(values, r_A, r_B, scale, rate)
        dv = tl.where(q == 0, 0, incoming - v_pivot - mean_v)
        dt = tl.where(q == 0, 0, (values - x_pivot) * scale * rate - mean_t)
        covariance += tl.sum(q * dt * dv)
        gradient = tl.where(R == 0, 0, (q * R * scale) * (dv * slope))
        if not LARGEST:
            gradient = -gradient
        gradient = tl.where(D == D, gradient, float("nan"))
        i = start + tl.arange(0, BLOCK)
        tl.store(grad_x + row * n + i, gradient.to(grad_x.dtype.element_ty), mask=i < n)

    bound = (P == 0) & (Q == 0)  # k outside its range, or no finite element
    to_k = tl.where(bound, 0, v_pivot + mean_v)
    to_alpha = tl.where(R == 0, 0, -(R * scale) * (covariance * LN_2 * slope))
    tl.store(grad_k + row, tl.where(D == D, to_k, float("nan")))
    tl.store(grad_alpha + row, tl.where(D == D, to_alpha, float("nan")))


def soft_topk_backward(
    x: Tensor, solution: Tensor, alpha: float | Tensor, v: Tensor, largest: bool = True, form: str = "p"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <p, v>: to x (rows, n) in x's dtype, to k and alpha (rows,) in the compute dtype."""
    rows, n = x.shape
    dtype = compute_dtype(x.dtype)
    grad_x = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    grad_k = torch.empty((rows,), dtype=dtype, device=x.device)
    grad_alpha = torch.empty_like(grad_k)
    if rows == 0:
        return grad_x, grad_k, grad_alpha
    x, v = launch.rows_of(x), launch.rows_of(v)
    tile = launch.tile(n, dtype, arrays=2)
    with launch.on_device(x):
        backward_kernel[(rows,)](
            x, x.stride(0), solution.contiguous(), *launch.per_row(alpha),
            v, v.stride(0), grad_x, grad_k, grad_alpha, n,
            LARGEST=largest, T=launch.triton_dtype(dtype), **tile._asdict(),
        )  # fmt: skip
    return grad_x, grad_k, grad_alpha
