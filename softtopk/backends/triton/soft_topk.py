"""soft_topk forward and backward in Triton, one program per row.

Bytes: the forward reads x and writes p, the backward reads x and v and writes grad_x, once each
where a row fits into registers (launch.py); a longer row is read three times. The log domain reads x
once more.
The first place to look: softtopk/backends/reference.py, the same in plain PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.reference import compute_dtype
from softtopk.backends.triton import launch
from softtopk.backends.triton.candidates import find_candidates, lanes, read_tiles, store_lanes
from softtopk.backends.triton.log_domain import log_backward_kernel, log_kernel
from softtopk.backends.triton.solve import densities, solve
from softtopk.backends.triton.sweeps import LN_2, exponent, per_row, read, scale_in, sums, tails


# n = 1 as a constant is one that Triton 3.6 cannot compile here, and nothing gains by n divisible by 16.
@triton.jit(do_not_specialize=["n", "k_bits", "alpha_bits"])
def forward_kernel(
    x, x_stride, k, k_stride, k_bits: tl.int64, alpha, alpha_stride, alpha_bits: tl.int64,
    out, solution, n,
    WRITE: tl.constexpr, LARGEST: tl.constexpr, T: tl.constexpr,
    FULL: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pointer = x + row * x_stride
    out += row * n
    tiles = read_tiles(pointer, n, LARGEST, FULL, TILES, DEPTH, LANES, T)
    budget = per_row(k, k_stride, k_bits, row)
    a = scale_in(per_row(alpha, alpha_stride, alpha_bits, row), T)
    scale, rate = exponent(a, T)
    m, floor, tail, top, found = find_candidates(
        tiles, pointer, n, out, budget, scale, rate, LARGEST, FULL, TILES, DEPTH, LANES
    )
    view = pointer
    if found:
        view = out
    r_A, r_B, P, Q, D = solve(
        view, tl.where(found, m, n), n, floor, tail, top, found, budget, a.to(T), scale, rate, LARGEST, BLOCK
    )
    solved = solution + row * 5
    tl.store(solved, r_A)
    tl.store(solved + 1, r_B)
    tl.store(solved + 2, P)
    tl.store(solved + 3, Q)
    tl.store(solved + 4, D)

    STEP: tl.constexpr = DEPTH * LANES
    start = tl.zeros((), tl.int32)
    if WRITE:
        R, q_A, q_B = densities(r_A, r_B, P, Q, D, a)
        one = tl.where(D == D, 1, float("nan")).to(T)
        h_A = -R * q_A
        h_B = R * q_B * one
        while start < (TILES * STEP if TILES > 0 else n):
            for i in tl.static_range(max(TILES, 1)):
                values = lanes(tiles, i, pointer, start, n, LARGEST, FULL, TILES, DEPTH, LANES)
                above = values >= r_A
                e = tails(values, r_A, r_B, scale, rate)
                weight = tl.where(above, one, 0) + tl.where(above, h_A, h_B) * e
                store_lanes(out, start, n, weight, FULL, DEPTH, LANES)
                start += STEP


def soft_topk_forward(
    x: Tensor, k: float | Tensor, alpha: float | Tensor, largest: bool = True, form: str = "p"
) -> tuple[Tensor | None, Tensor]:
    """What `form` names, (rows, n) in x's dtype, and the solution (rows, 5) in the compute dtype."""
    rows, n = x.shape
    dtype = compute_dtype(x.dtype)
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)  # the kernel's scratch memory, too
    solution = torch.empty((rows, 5), dtype=dtype, device=x.device)
    if rows > 0:
        x = launch.rows_of(x)
        arguments = (x, x.stride(0), *launch.per_row(k), *launch.per_row(alpha), out, solution, n)
        launch.run("forward", forward_kernel, x, arguments, WRITE=form == "p", LARGEST=largest)
        if form in ("log", "log_complement"):
            arguments = (x, x.stride(0), solution, *launch.per_row(alpha), out, n)
            launch.run("log", log_kernel, x, arguments, COMPLEMENT=form == "log_complement", LARGEST=largest)
    return (None if form == "none" else out), solution


@triton.jit
def read_chunks(pointer, n, LARGEST: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """A row in registers, as a tuple of chunks; one that nothing uses is not read."""
    chunks = (read(pointer, 0, n, LARGEST, BLOCK, T),)
    for i in tl.static_range(1, TILES):
        chunks += (read(pointer, i * BLOCK, n, LARGEST, BLOCK, T),)
    return chunks


@triton.jit
def one_of(
    chunks, j: tl.constexpr, KEPT: tl.constexpr, pointer, start, n, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    """Chunk j of a row that is kept, or the one at start, read again."""
    if KEPT:
        x = chunks[j]
    else:
        x = read(pointer, start, n, LARGEST, BLOCK, chunks[0].dtype)
    return x


@triton.jit(do_not_specialize=["alpha_bits"])
def backward_kernel(
    x, x_stride, solution, alpha, alpha_stride, alpha_bits: tl.int64, v, v_stride,
    grad_x, grad_k, grad_alpha, n,
    LARGEST: tl.constexpr, T: tl.constexpr,
    TILES: tl.constexpr, KEEP_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row * x_stride
    v_row = v + row * v_stride
    x_tiles = read_chunks(x_row, n, LARGEST, TILES, BLOCK, T)
    v_tiles = read_chunks(v_row, n, True, TILES, BLOCK, T)
    r_A = tl.load(solution + row * 5)
    r_B = tl.load(solution + row * 5 + 1)
    P = tl.load(solution + row * 5 + 2)
    Q = tl.load(solution + row * 5 + 3)
    D = tl.load(solution + row * 5 + 4)
    a = scale_in(per_row(alpha, alpha_stride, alpha_bits, row), T)
    scale, rate = exponent(a, T)
    R, q_A, q_B = densities(r_A, r_B, P, Q, D, a)

    # The largest q is at r_A or r_B; the pivot is the first such element. Without one, v = 0 will do.
    top_A = tl.where(q_A >= q_B, r_A, float("nan"))
    top_B = tl.where(q_B >= q_A, r_B, float("nan"))
    first = tl.full([BLOCK], n, tl.int32)
    start = tl.zeros((), tl.int32)
    while start < (TILES * BLOCK if TILES > 0 else n):
        for j in tl.static_range(max(TILES, 1)):
            values = one_of(x_tiles, j, TILES > 0, x_row, start, n, LARGEST, BLOCK)
            i = start + tl.arange(0, BLOCK)
            first = tl.minimum(first, tl.where((values == top_A) | (values == top_B), i, n))
            start += BLOCK
    pivot = tl.min(first)
    v_pivot = tl.load(v_row + pivot, mask=pivot < n, other=0).to(T)
    x_pivot = tl.where(q_A >= q_B, r_A, r_B)

    # t is in units of alpha ln 2: the base of `rate`.
    slope = rate * LN_2  # 1 / alpha = scale * slope, which as one number may overflow
    part_v = tl.zeros([BLOCK], T)
    part_t = tl.zeros([BLOCK], T)
    start = tl.zeros((), tl.int32)
    while start < (TILES * BLOCK if TILES > 0 else n):
        for j in tl.static_range(max(TILES, 1)):
            values = one_of(x_tiles, j, TILES > 0, x_row, start, n, LARGEST, BLOCK)
            incoming = one_of(v_tiles, j, KEEP_V, v_row, start, n, True, BLOCK)
            q = tl.where(values >= r_A, q_A, q_B) * tails(values, r_A, r_B, scale, rate)
            part_v += tl.where(q == 0, 0, q * (incoming - v_pivot))
            part_t += tl.where(q == 0, 0, q * ((values - x_pivot) * scale * rate))
            start += BLOCK
    mean_v, mean_t = sums(part_v, part_t)

    if (TILES > 0) & (not KEEP_V):
        # Read again, so that q is computed again: there are no registers to keep all of it.
        r_A = tl.load(solution + row * 5, volatile=True)
        r_B = tl.load(solution + row * 5 + 1, volatile=True)
        x_pivot = tl.where(q_A >= q_B, r_A, r_B)
    products = tl.zeros([BLOCK], T)
    start = tl.zeros((), tl.int32)
    while start < (TILES * BLOCK if TILES > 0 else n):
        for j in tl.static_range(max(TILES, 1)):
            values = one_of(x_tiles, j, TILES > 0, x_row, start, n, LARGEST, BLOCK)
            incoming = one_of(v_tiles, j, KEEP_V, v_row, start, n, True, BLOCK)
            q = tl.where(values >= r_A, q_A, q_B) * tails(values, r_A, r_B, scale, rate)
            dv = tl.where(q == 0, 0, incoming - v_pivot - mean_v)
            dt = tl.where(q == 0, 0, (values - x_pivot) * scale * rate - mean_t)
            products += q * dt * dv
            gradient = tl.where(R == 0, 0, (q * R * scale) * (dv * slope))
            if not LARGEST:
                gradient = -gradient
            gradient = tl.where(D == D, gradient, float("nan"))
            i = start + tl.arange(0, BLOCK)
            tl.store(grad_x + row * n + i, gradient.to(grad_x.dtype.element_ty), mask=i < n)
            start += BLOCK
    covariance = tl.sum(products)

    bound = (P == 0) & (Q == 0)  # k outside its range, or no finite element
    to_k = tl.where(bound, 0, v_pivot + mean_v)
    to_alpha = tl.where(R == 0, 0, -(R * scale) * (covariance * LN_2 * slope))
    tl.store(grad_k + row, tl.where(D == D, to_k, float("nan")))
    tl.store(grad_alpha + row, tl.where(D == D, to_alpha, float("nan")))


def soft_topk_backward(
    x: Tensor,
    solution: Tensor,
    alpha: float | Tensor,
    v: Tensor,
    largest: bool = True,
    form: str = "p",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <p, v>, or of <log p, v> or <log(1 - p), v>: to x (rows, n) in x's dtype, to k and
    alpha (rows,) in the compute dtype."""
    rows, n = x.shape
    dtype = compute_dtype(x.dtype)
    grad_x = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    grad_k = torch.empty((rows,), dtype=dtype, device=x.device)
    grad_alpha = torch.empty_like(grad_k)
    if rows > 0:
        x, v = launch.rows_of(x), launch.rows_of(v)
        arguments = (
            x, x.stride(0), solution.contiguous(), *launch.per_row(alpha),
            v, v.stride(0), grad_x, grad_k, grad_alpha, n,
        )  # fmt: skip
        if form == "p":
            launch.run("backward", backward_kernel, x, arguments, LARGEST=largest)
        else:
            complement = form == "log_complement"
            launch.run(
                "log_backward", log_backward_kernel, x, arguments, LARGEST=largest, COMPLEMENT=complement
            )
    return grad_x, grad_k, grad_alpha
