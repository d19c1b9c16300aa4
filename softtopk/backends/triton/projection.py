"""relu(x W^T + c) . w2 of 16-bit products in kernels that make the products themselves.

What follows a product is done with it while it is in registers: the forward writes a bit for each element of
the hidden layer and a score for each tile's rows, the backward the gradient, scaled, and its part of what w2
gets. Nothing else is written, and sums are in a fixed order. Wider dtypes are left to the library's products
(softtopk/backends/projection.py).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends import projection
from softtopk.backends.triton.launch import on_device

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
GROUP = 8  # tiles along the first dimension that share what they read of the other operand
EXPAND = (32, 256)  # rows and columns of a program that expands the mask


@triton.jit
def tile_of(program, first_tiles, second_tiles, GROUP: tl.constexpr):
    """The tile of a program: a group of rows of tiles is done column by column."""
    per_group = GROUP * second_tiles
    start = program // per_group * GROUP
    size = min(first_tiles - start, GROUP)
    within = program % per_group
    return start + within % size, within // size


@triton.jit
def forward_kernel(
    x, weight, bias, w2, parts, mask,
    rows, n, d, mask_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter has no products of bfloat16
    STEPS: tl.constexpr, WHOLE: tl.constexpr,  # of BLOCK_K along d; no more than d
):  # fmt: skip
    """parts[column tile, row] and the bits of a tile of x W^T + c."""
    first, second = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    row = first * BLOCK_M + tl.arange(0, BLOCK_M)
    column = second * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the last read the last again, so that only k needs a mask.
    x += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * d + k[None, :]
    weight += tl.minimum(column, n - 1).to(tl.int64)[None, :] * d + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        if WHOLE:
            a, b = tl.load(x), tl.load(weight)
        else:
            left = d - step * BLOCK_K
            a = tl.load(x, mask=k[None, :] < left, other=0.0)
            b = tl.load(weight, mask=k[:, None] < left, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b, z)
        x += BLOCK_K
        weight += BLOCK_K
    there = column < n
    z += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    on = (z > 0) | (z != z)
    score = tl.where(on, z * tl.load(w2 + column, mask=there, other=0.0)[None, :], 0.0)
    tl.store(parts + second.to(tl.int64) * rows + row, tl.sum(score, 1), mask=row < rows)

    on = on & there[None, :]
    bits = tl.reshape(on.to(tl.int32), (BLOCK_M, BLOCK_N // 8, 8)) << tl.arange(0, 8)[None, None, :]
    byte = second * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    fits = (row < rows)[:, None] & (byte * 8 < n)[None, :]
    to = mask + row.to(tl.int64)[:, None] * mask_stride + byte[None, :]
    tl.store(to, tl.sum(bits, 2).to(tl.uint8), mask=fits)


@triton.jit
def expand_kernel(
    mask, g, expanded, sums,
    rows, columns, mask_stride, stride, sums_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g where the mask is set, else 0, and its sums over the program's rows."""
    part = tl.program_id(0)
    row = part * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    fits = (row < rows)[:, None] & (byte * 8 < columns)[None, :]
    packed = tl.load(mask + row.to(tl.int64)[:, None] * mask_stride + byte[None, :], mask=fits, other=0)
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    bits = tl.reshape(bits, (ROWS, COLUMNS))
    there = column < columns
    of_row = tl.load(g + row, mask=row < rows, other=0.0)
    values = tl.where(bits != 0, of_row[:, None], 0.0)
    to = expanded + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(to, values.to(expanded.dtype.element_ty), mask=(row < rows)[:, None] & there[None, :])
    tl.store(sums + part.to(tl.int64) * sums_stride + column, tl.sum(values, 0), mask=there)


@triton.jit
def backward_kernel(
    expanded, x, weight, w2, grad_weight, dots, squares,
    rows, columns, d, stride, dots_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter has no products of bfloat16
    STEPS: tl.constexpr, WHOLE: tl.constexpr,  # of BLOCK_K along the rows; no more than they are
):  # fmt: skip
    """A tile of G = (g mask)^T x: w2_j G_j, and over its columns dots[column tile, j] = <W_j, G_j> and, where
    there is a place for them, squares[column tile, j] = |w2_j G_j|^2."""
    first, second = tile_of(tl.program_id(0), tl.cdiv(columns, BLOCK_M), tl.cdiv(d, BLOCK_N), GROUP)
    latent = first * BLOCK_M + tl.arange(0, BLOCK_M)
    column = second * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there, within = latent < columns, column < d
    expanded += k.to(tl.int64)[:, None] * stride + latent[None, :]
    x += k.to(tl.int64)[:, None] * d + column[None, :]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        a_mask, b_mask = there[None, :], within[None, :]
        if not WHOLE:
            left = (k < rows - step * BLOCK_K)[:, None]
            a_mask, b_mask = a_mask & left, b_mask & left
        a, b = tl.load(expanded, mask=a_mask, other=0.0), tl.load(x, mask=b_mask, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(tl.trans(a), b, products)
        expanded += BLOCK_K * stride.to(tl.int64)
        x += BLOCK_K * d
    fits = there[:, None] & within[None, :]
    place = latent.to(tl.int64)[:, None] * d + column[None, :]
    w = tl.load(weight + place, mask=fits, other=0.0).to(tl.float32)
    of_latent = tl.load(w2 + latent, mask=there, other=0.0)
    scaled = products * of_latent[:, None]
    tl.store(grad_weight + place, scaled.to(grad_weight.dtype.element_ty), mask=fits)
    to = second.to(tl.int64) * dots_stride + latent
    tl.store(dots + to, tl.sum(products * w, 1), mask=there)
    if squares is not None:
        tl.store(squares + to, tl.sum(scaled * scaled, 1), mask=there)


class TritonSteps(projection.TorchSteps):
    @staticmethod
    def expand_mask(mask: Tensor, g: Tensor, expanded: Tensor) -> Tensor:
        rows, columns = expanded.shape
        parts = triton.cdiv(rows, EXPAND[0])
        sums = g.new_empty(parts, columns)
        if sums.numel():
            with on_device(g):
                expand_kernel[(parts, triton.cdiv(columns, EXPAND[1]))](
                    mask, g, expanded, sums,
                    rows, columns, mask.stride(0), expanded.stride(0), sums.stride(0),
                    ROWS=EXPAND[0], COLUMNS=EXPAND[1],
                )  # fmt: skip
        return sums


class TritonProjection(projection.Projection):
    def relu_projection_forward(self, x, weight, bias, w2):
        n, d = weight.shape
        if x.dtype not in SIXTEEN_BITS or x.numel() == 0 or n == 0:
            return super().relu_projection_forward(x, weight, bias, w2)
        tile = tiles(x.device)
        mask = x.new_empty(len(x), (n + 7) // 8, dtype=torch.uint8)
        parts = w2.new_empty(triton.cdiv(n, tile["BLOCK_N"]), len(x))
        with on_device(x):
            forward_kernel[(triton.cdiv(len(x), tile["BLOCK_M"]) * len(parts),)](
                x, weight.to(x.dtype), bias, w2, parts, mask,
                len(x), n, d, mask.stride(0),
                GROUP=GROUP, **steps(d, tile), **tile,
            )  # fmt: skip
        return parts.sum(0), mask

    def chunk_columns(self, x, weight):
        """Where it is a matter of the backward's tiles, whole waves of them."""
        if x.dtype not in SIXTEEN_BITS or not x.is_cuda:
            return super().chunk_columns(x, weight)
        tile = tiles(x.device)
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        wave = max(programs // triton.cdiv(weight.shape[1], tile["BLOCK_N"]), 1) * tile["BLOCK_M"]
        row = x.element_size() * max(len(x), 1)
        return max(projection.CHUNK_BYTES // (row * wave), 1) * wave

    def chunk_gradients(
        self, part, expanded, x, weight, bias, w2, sums, grad_weight, grad_bias, grad_w2, squares
    ):
        rows, columns = expanded.shape
        d = weight.shape[1]
        if x.dtype not in SIXTEEN_BITS or x.numel() == 0:
            return super().chunk_gradients(
                part, expanded, x, weight, bias, w2, sums, grad_weight, grad_bias, grad_w2, squares
            )
        tile = tiles(x.device)
        dots = w2.new_empty(triton.cdiv(d, tile["BLOCK_N"]), columns)
        parts = None if squares is None else torch.empty_like(dots)
        with on_device(x):
            backward_kernel[(triton.cdiv(columns, tile["BLOCK_M"]) * len(dots),)](
                expanded, x, weight[part].to(x.dtype), w2[part], grad_weight[part], dots, parts,
                rows, columns, d, expanded.stride(0), dots.stride(0),
                GROUP=GROUP, **steps(rows, tile), **tile,
            )  # fmt: skip
        gamma = sums.sum(0)
        torch.mul(w2[part], gamma, out=grad_bias[part])
        torch.addcmul(dots.sum(0), bias[part].to(w2.dtype), gamma, out=grad_w2[part])
        if parts is not None:
            torch.sum(parts, 0, out=squares[part])


@functools.cache
def tiles(device: torch.device) -> dict[str, int]:
    """What of the products a program makes, by the shared memory that it can have."""
    if device.type != "cuda":  # the interpreter
        return dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, WIDEN=True)
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if memory >= 200 << 10:
        return dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, WIDEN=False, num_warps=8, num_stages=4)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, WIDEN=False, num_warps=4, num_stages=4)


def steps(length: int, tile: dict[str, int]) -> dict[str, int | bool]:
    """The constants of a product along `length`: a kernel is compiled anew for another number of steps."""
    return dict(STEPS=triton.cdiv(length, tile["BLOCK_K"]), WHOLE=length % tile["BLOCK_K"] == 0)


in_kernels = TritonProjection(TritonSteps)
relu_projection_forward = in_kernels.relu_projection_forward
relu_projection_backward = in_kernels.relu_projection_backward
