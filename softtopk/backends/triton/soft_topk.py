"""soft_topk forward and backward in Triton, one program per row.

Bytes: the forward reads x and writes p, the backward reads x and v and writes grad_x. Each is read from
memory once, and again from registers, or from the cache where a row is short beside it (launch.py);
a longer row is read three times. The log domain reads x once more.
The first place to look: softtopk/backends/reference.py, the same in plain PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.reference import compute_dtype
from softtopk.backends.triton import launch
from softtopk.backends.triton.candidates import find_candidates
from softtopk.backends.triton.kept import kept_candidates
from softtopk.backends.triton.log_domain import log_backward_kernel, log_kernel
from softtopk.backends.triton.solve import densities, solve
from softtopk.backends.triton.sweeps import (
    INF,
    LN_2,
    distance,
    exponent,
    origin_below,
    per_row,
    plain,
    read,
    scale_in,
    sums,
    tails,
)  # fmt: skip
from softtopk.backends.triton.tiles import lanes, read_lanes, read_tiles, store_lanes


# n = 1 as a constant is one that Triton 3.6 cannot compile here, and nothing gains by n divisible by 16.
@triton.jit(do_not_specialize=["n", "k_bits", "alpha_bits"])
def forward_kernel(
    x, x_stride, k, k_stride, k_bits: tl.int64, alpha, alpha_stride, alpha_bits: tl.int64,
    out, solution, n,
    WRITE: tl.constexpr, LARGEST: tl.constexpr, T: tl.constexpr,
    FULL: tl.constexpr, KEEP: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pointer = x + row * x_stride
    out += row * n
    tiles = read_tiles(pointer, n, LARGEST, FULL, TILES, DEPTH, LANES, T)
    budget = per_row(k, k_stride, k_bits, row)
    a = scale_in(per_row(alpha, alpha_stride, alpha_bits, row), T)
    scale, rate = exponent(a, T)
    view = pointer
    if TILES > 0:
        tile, m, floor, tail, top, found = kept_candidates(
            tiles, pointer, n, budget, scale, rate, LARGEST, FULL, KEEP, TILES, DEPTH, LANES, GROUPS, SLOTS
        )
    else:
        m, floor, tail, top, found = find_candidates(
            pointer, n, out, budget, scale, rate, LARGEST, FULL, DEPTH, LANES, T
        )
        if found:
            view = out
        tile = read(view, 0, tl.where(found, m, n), LARGEST, BLOCK, T)
    r_A, r_B, P, Q, D = solve(
        tile, view, tl.where(found, m, n), n, floor, tail, top, found,
        budget, a.to(T), scale, rate, LARGEST, BLOCK,
    )  # fmt: skip
    solved = solution + row * 5
    tl.store(solved, r_A)
    tl.store(solved + 1, r_B)
    tl.store(solved + 2, P)
    tl.store(solved + 3, Q)
    tl.store(solved + 4, D)

    if WRITE:
        STEP: tl.constexpr = DEPTH * LANES
        R, q_A, q_B = densities(r_A, r_B, P, Q, D, a)
        one = tl.where(D == D, 1, float("nan")).to(T)
        h_A = R * q_A
        h_B = R * q_B * one
        origin_A, rest_A = origin_below(r_A, rate)
        origin_B, rest_B = origin_below(-r_B, rate)
        if plain(scale, tl.maximum(tl.abs(origin_A), tl.abs(origin_B))):
            h_A *= -tl.exp2(rest_A)
            h_B *= tl.exp2(rest_B)
            start = tl.zeros((), tl.int32)
            while start < (TILES * STEP if TILES > 0 else n):
                for i in tl.static_range(max(TILES, 1)):
                    x_tile = lanes(tiles, i, pointer + start, n - start, LARGEST, FULL, KEEP, DEPTH, LANES)
                    above = x_tile >= r_A
                    origin = tl.where(above, origin_A, -origin_B)
                    t = distance(x_tile, tl.where(above, r_A, r_B), rate, origin)
                    e = tl.exp2(tl.abs(t) * -1.0)
                    weight = tl.where(above, one, 0) + tl.where(above, h_A, h_B) * e
                    store_lanes(out, start + i * STEP, n, weight, FULL, DEPTH, LANES)
                start += max(TILES, 1) * STEP
        else:
            start = tl.zeros((), tl.int32)
            while start < n:
                x_tile = read_lanes(pointer, start, n, LARGEST, FULL, DEPTH, LANES, T)
                above = x_tile >= r_A
                e = tails(x_tile, r_A, r_B, scale, rate)
                weight = tl.where(above, one, 0) + tl.where(above, -h_A, h_B) * e
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
def gradients(
    x_row, v_row, out, x_tiles, v_tiles, n, r_A, r_B, q_A, q_B, R, D, scale, rate, again,
    PLAIN: tl.constexpr, LARGEST: tl.constexpr, FULL: tl.constexpr,
    TILES: tl.constexpr, KEEP_X: tl.constexpr, KEEP_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(v_pivot + mean_v, covariance), after the gradient of x is written: TILES chunks of BLOCK elements at a
    time. PLAIN: `distance` holds."""
    T: tl.constexpr = r_A.dtype
    # The largest q is at r_A or r_B; the pivot is the last such element. Without one, v = 0 will do.
    x_pivot = tl.where(q_A >= q_B, r_A, r_B)
    last = tl.full([BLOCK], -1, tl.int32)
    start = tl.zeros((), tl.int32)
    while start < (TILES * BLOCK if KEEP_X else n):
        for j in tl.static_range(TILES):
            x = one_of(x_tiles, j, KEEP_X, x_row, start, n, LARGEST, FULL, BLOCK, T)
            last = tl.where(x == x_pivot, start + j * BLOCK, last)
        start += TILES * BLOCK
    pivot = tl.max(tl.where(last < 0, -1, last + tl.arange(0, BLOCK)))
    v_pivot = tl.load(v_row + pivot, mask=pivot >= 0, other=0).to(T)

    origin_A, rest_A = origin_below(r_A, rate)
    origin_B, rest_B = origin_below(-r_B, rate)
    if PLAIN:
        q_A *= tl.exp2(rest_A)
        q_B *= tl.exp2(rest_B)
    part_v = tl.zeros([BLOCK], T)
    part_t = tl.zeros([BLOCK], T)
    start = tl.zeros((), tl.int32)
    while start < (TILES * BLOCK if KEEP_X else n):
        for j in tl.static_range(TILES):
            x = one_of(x_tiles, j, KEEP_X, x_row, start, n, LARGEST, FULL, BLOCK, T)
            v = one_of(v_tiles, j, KEEP_V, v_row, start, n, True, FULL, BLOCK, T)
            q = densities_at(x, r_A, r_B, q_A, q_B, origin_A, -origin_B, scale, rate, PLAIN)
            t = relative(x, x_pivot, scale, rate, PLAIN)
            part_v += q * tl.where(q == 0, 0, v - v_pivot)
            part_t += q * tl.where(q == 0, 0, t)
        start += TILES * BLOCK
    mean_v, mean_t = sums(part_v, part_t)

    if not (KEEP_X and KEEP_V):
        # Read again, so that q is computed again: there are no registers to keep all of it.
        r_A = tl.load(again, volatile=True)
        r_B = tl.load(again + 1, volatile=True)
        x_pivot = tl.where(q_A >= q_B, r_A, r_B)
    least = tl.where(R == 0, INF, 0)  # where h = 0 everywhere, v may be anything
    gain = tl.where(R == 0, 0, (R * scale) * (rate * LN_2))
    gain = tl.where(D == D, gain if LARGEST else -gain, float("nan"))
    products = tl.zeros([BLOCK], T)
    start = tl.zeros((), tl.int32)
    while start < (TILES * BLOCK if KEEP_X else n):
        for j in tl.static_range(TILES):
            x = one_of(x_tiles, j, KEEP_X, x_row, start, n, LARGEST, FULL, BLOCK, T)
            v = one_of(v_tiles, j, KEEP_V, v_row, start, n, True, FULL, BLOCK, T)
            q = densities_at(x, r_A, r_B, q_A, q_B, origin_A, -origin_B, scale, rate, PLAIN)
            counts = q > least
            dv = tl.where(counts, v - v_pivot - mean_v, 0)
            dt = tl.where(counts, relative(x, x_pivot, scale, rate, PLAIN) - mean_t, 0)
            if PLAIN:
                q_dv = q * dv
                products += q_dv * dt
                gradient = q_dv * gain
            else:  # in an order that neither overflows nor underflows
                products += q * dt * dv
                sign = 1 if LARGEST else -1
                gradient = (q * R * scale) * (dv * (rate * (LN_2 * sign)))
                gradient = tl.where(D == D, gradient, float("nan"))
            i = start + j * BLOCK + tl.arange(0, BLOCK)
            gradient = gradient.to(out.dtype.element_ty)
            if FULL:
                tl.store(out + i, gradient)
            else:
                tl.store(out + i, gradient, mask=i < n)
        start += TILES * BLOCK
    return v_pivot + mean_v, tl.sum(products)


@triton.jit
def densities_at(x, r_A, r_B, q_A, q_B, origin_A, origin_B, scale, rate, PLAIN: tl.constexpr):
    above = x >= r_A
    if PLAIN:
        t = distance(x, tl.where(above, r_A, r_B), rate, tl.where(above, origin_A, origin_B))
        e = tl.exp2(tl.abs(t) * -1.0)
    else:
        e = tails(x, r_A, r_B, scale, rate)
    return tl.where(above, q_A, q_B) * e


@triton.jit
def relative(x, r, scale, rate, PLAIN: tl.constexpr):
    """t less that of r and, if PLAIN, the same rest for all x; in units of alpha ln 2, the base of `rate`."""
    if PLAIN:
        t = distance(x, r, rate, r * rate)
    else:
        t = (x - r) * scale * rate
    return t


@triton.jit
def one_of(
    tiles, j: tl.constexpr, KEPT: tl.constexpr, pointer, start, n,
    LARGEST: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Chunk j of a row that is kept, or the one from start on, read again."""
    if KEPT:
        x = tiles[j]
    else:
        x = read_chunk(pointer, start + j * BLOCK, n, LARGEST, FULL, BLOCK, T)
    return x


@triton.jit
def read_chunk(
    pointer, start, n, LARGEST: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr
):
    if FULL:
        x = tl.load(pointer + start + tl.arange(0, BLOCK)).to(T)
        x = x if LARGEST else -x
    else:
        x = read(pointer, start, n, LARGEST, BLOCK, T)
    return x


@triton.jit
def read_chunks(
    pointer, n,
    LARGEST: tl.constexpr, FULL: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A row in registers, as a tuple of chunks; one that nothing uses is not read."""
    chunks = (read_chunk(pointer, 0, n, LARGEST, FULL, BLOCK, T),)
    for i in tl.static_range(1, TILES):
        chunks += (read_chunk(pointer, i * BLOCK, n, LARGEST, FULL, BLOCK, T),)
    return chunks


@triton.jit(do_not_specialize=["alpha_bits"])
def backward_kernel(
    x, x_stride, solution, alpha, alpha_stride, alpha_bits: tl.int64, v, v_stride,
    grad_x, grad_k, grad_alpha, n,
    LARGEST: tl.constexpr, T: tl.constexpr, FULL: tl.constexpr,
    TILES: tl.constexpr, KEEP_X: tl.constexpr, KEEP_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row * x_stride
    v_row = v + row * v_stride
    out = grad_x + row * n
    x_tiles = read_chunks(x_row, n, LARGEST, FULL, TILES, BLOCK, T)
    v_tiles = read_chunks(v_row, n, True, FULL, TILES, BLOCK, T)
    solved = solution + row * 5
    r_A = tl.load(solved)
    r_B = tl.load(solved + 1)
    P = tl.load(solved + 2)
    Q = tl.load(solved + 3)
    D = tl.load(solved + 4)
    a = scale_in(per_row(alpha, alpha_stride, alpha_bits, row), T)
    scale, rate = exponent(a, T)
    R, q_A, q_B = densities(r_A, r_B, P, Q, D, a)

    origin_A, _ = origin_below(r_A, rate)
    origin_B, _ = origin_below(r_B, rate)
    if plain(scale, tl.maximum(tl.abs(origin_A), tl.abs(origin_B))):
        to_k, covariance = gradients(
            x_row, v_row, out, x_tiles, v_tiles, n, r_A, r_B, q_A, q_B, R, D, scale, rate, solved,
            True, LARGEST, FULL, TILES, KEEP_X, KEEP_V, BLOCK,
        )  # fmt: skip
    else:
        to_k, covariance = gradients(
            x_row, v_row, out, x_tiles, v_tiles, n, r_A, r_B, q_A, q_B, R, D, scale, rate, solved,
            False, LARGEST, False, 1, False, False, BLOCK,
        )  # fmt: skip

    bound = (P == 0) & (Q == 0)  # k outside its range, or no finite element
    to_k = tl.where(bound, 0, to_k)
    # t is in units of alpha ln 2, and 1 / alpha = scale * slope, which as one number may overflow.
    slope = rate * LN_2
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
