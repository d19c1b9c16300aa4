"""relu(x W^T + c) . w2 and its gradients, without the hidden layer.

The products are the library's, a chunk of the hidden layer's columns at a time into a buffer that stays in
the cache. What a backend does with a chunk are three steps:

    relu_dot(z, w2, add, scores, mask)      scores (B,) (+)= relu(z) . w2; mask (B, bytes): bit j % 8 of byte
                                            j // 8 is z_j > 0
    expand_mask(mask, g, expanded)          expanded (B, columns) = g_b mask_bj, rounded; returns sums
                                            (parts, columns), whose total is gamma_j = sum_b g_b mask_bj
    scale_gradient(products, weight, bias, w2, sums, grad_weight, grad_bias, grad_w2, squares)

With G_j = sum_b g_b mask_bj x_b, the products of the expanded mask and x, the gradients are w2_j G_j of the
weight, w2_j gamma_j of the bias and <W_j, G_j> + c_j gamma_j of w2, since relu(z) = mask (x W^T + c).
squares, where wanted, are |w2_j G_j|^2.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20  # of the hidden layer, or of its mask expanded
PRODUCT_BYTES = 16 << 20  # of the products that are made before they are scaled
COLUMNS = 256  # a chunk's columns are a multiple of these, but for the last


class Projection:
    """The forward and the backward on the steps of a backend. x (B, d), weight (n, d) and bias (n,) are of
    one dtype and contiguous, but a weight of another is rounded to that, a chunk at a time; w2 (n,), the
    scores (B,) and their gradient g are of its compute dtype."""

    def __init__(self, steps):
        self.steps = steps

    def relu_projection_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, w2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scores, and the mask (B, ceil(n / 8)) of bits."""
        scores = x.new_empty(len(x), dtype=w2.dtype)
        if len(weight) == 0:
            scores.zero_()
        mask = x.new_empty(len(x), (len(weight) + 7) // 8, dtype=torch.uint8)
        chunks, buffer = columns_at_a_time(x, len(weight), self.chunk_columns(x, weight))
        for part in chunks:
            z = columns_of(buffer, len(x), part)
            torch.addmm(bias[part], x, weight[part].to(x.dtype).t(), out=z)
            self.steps.relu_dot(z, w2[part], part.start > 0, scores, mask[:, part.start // 8 :])
        return scores, mask

    def relu_projection_backward(
        self,
        g: Tensor,
        mask: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        w2: Tensor,
        out_dtype: torch.dtype,
        want_x: bool,
        squares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of weight (in out_dtype: x's or the compute dtype), bias, w2 and x (in the compute
        dtype, the last only if wanted). squares (n,), of the compute dtype, are written if given."""
        g = g.contiguous()
        grad_weight = weight.new_empty(weight.shape, dtype=out_dtype)
        grad_bias, grad_w2 = torch.empty_like(w2), torch.empty_like(w2)
        grad_x = x.new_zeros(x.shape, dtype=w2.dtype) if want_x else None
        ones = torch.ones_like(g) if want_x else None
        chunks, buffer = columns_at_a_time(x, len(weight), self.chunk_columns(x, weight))
        for part in chunks:
            expanded = columns_of(buffer, len(x), part)
            sums = self.steps.expand_mask(mask[:, part.start // 8 :], g, expanded)
            self.chunk_gradients(
                part, expanded, x, weight, bias, w2, sums, grad_weight, grad_bias, grad_w2, squares
            )
            if want_x:  # g is multiplied with at the end, where it need not be rounded
                self.steps.expand_mask(mask[:, part.start // 8 :], ones, expanded)
                rounded = weight[part].to(x.dtype)
                scaled = torch.mul(rounded, w2[part, None], out=torch.empty_like(rounded))
                grad_x += multiply(expanded, scaled, torch.empty_like(grad_x))
        return grad_weight, grad_bias, grad_w2, None if grad_x is None else grad_x.mul_(g[:, None])

    def chunk_columns(self, x: Tensor, weight: Tensor) -> int:
        return even(len(weight), CHUNK_BYTES // (x.element_size() * max(len(x), 1)))

    def chunk_gradients(
        self, part, expanded, x, weight, bias, w2, sums, grad_weight, grad_bias, grad_w2, squares
    ):
        """The rows `part` of the gradients: the products, and what is done with them in the cache."""
        for inner in products_at_a_time(part, weight, w2.dtype):
            place = slice(inner.start - part.start, inner.stop - part.start)
            products = grad_weight[inner]
            if products.dtype != w2.dtype:
                products = torch.empty_like(products, dtype=w2.dtype)
            multiply(expanded[:, place].t(), x, products)
            self.steps.scale_gradient(
                products,
                weight[inner].to(expanded.dtype),
                bias[inner],
                w2[inner],
                sums[:, place],
                grad_weight[inner],
                grad_bias[inner],
                grad_w2[inner],
                None if squares is None else squares[inner],
            )


def columns_at_a_time(x: Tensor, n: int, columns: int) -> tuple[Iterator[slice], Tensor]:
    """The chunks of the hidden layer's n columns, and a buffer for any of them."""
    buffer = x.new_empty(len(x) * min(columns, round_up(n, 8)))
    return (slice(i, min(i + columns, n)) for i in range(0, n, columns)), buffer


def products_at_a_time(part: slice, weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    columns = even(part.stop - part.start, PRODUCT_BYTES // max(weight.shape[1] * dtype.itemsize, 1))
    return (slice(i, min(i + columns, part.stop)) for i in range(part.start, part.stop, columns))


def columns_of(buffer: Tensor, rows: int, part: slice) -> Tensor:
    """The buffer as (rows, columns of the part), rows on 16 bytes. What is between them is 0: kernels read
    eight columns at a time."""
    columns = part.stop - part.start
    stride = round_up(columns, 8)
    whole = buffer[: rows * stride].view(rows, stride)
    whole[:, columns:].zero_()
    return whole[:, :columns]


def even(n: int, most: int) -> int:
    """The columns of a chunk: as many as fit, in chunks as equal as may be."""
    most = max(most // COLUMNS, 1) * COLUMNS
    chunks = max((n + most - 1) // most, 1)
    return round_up((n + chunks - 1) // chunks, COLUMNS) or COLUMNS


def round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b, whose dtype may be the compute dtype of theirs: accumulated in that."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    if hasattr(torch.ops.aten.mm, "dtype_out"):
        return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    return out.copy_(torch.mm(a, b))  # torch before 2.8: rounded once more


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, whose dtype may be the compute dtype of theirs: accumulated in that."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif not a.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif adds_to_wider(a.dtype, total.dtype, a.device):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.add_(multiply(a, b, torch.empty_like(total)))


@functools.cache
def adds_to_wider(dtype: torch.dtype, wider: torch.dtype, device: torch.device) -> bool:
    """Whether torch, whose versions differ in it, adds a product to a matrix of a wider dtype on a GPU."""
    if not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    factor = torch.zeros(8, 8, dtype=dtype, device=device)
    total = factor.to(wider)
    try:
        torch.ops.aten.addmm.dtype_out(total, factor, factor, wider, out=total)
    except RuntimeError:
        return False
    return True


class TorchSteps:
    """The three steps in torch, anywhere."""

    @staticmethod
    def relu_dot(z: Tensor, w2: Tensor, add: bool, scores: Tensor, mask: Tensor) -> None:
        part = torch.mv(z.relu().to(w2.dtype), w2)
        scores.copy_(scores + part if add else part)
        packed = pack(~(z <= 0))
        mask[:, : packed.shape[1]] = packed

    @staticmethod
    def expand_mask(mask: Tensor, g: Tensor, expanded: Tensor) -> Tensor:
        bits = unpack(mask, expanded.shape[1])
        expanded.copy_(torch.where(bits != 0, g[:, None], 0))
        return torch.mv(bits.t().to(g.dtype), g)[None]

    @staticmethod
    def scale_gradient(products, weight, bias, w2, sums, grad_weight, grad_bias, grad_w2, squares) -> None:
        gamma = sums.sum(0)
        torch.addcmul(
            torch.linalg.vecdot(products, weight.to(w2.dtype)), bias.to(w2.dtype), gamma, out=grad_w2
        )
        torch.mul(w2, gamma, out=grad_bias)
        torch.mul(products, w2[:, None], out=grad_weight)
        if squares is not None:
            torch.sum(grad_weight.to(w2.dtype).square(), 1, out=squares)


def pack(bits: Tensor) -> Tensor:
    """bool (B, n) -> uint8 (B, ceil(n / 8)), bit i % 8 of byte i // 8."""
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(len(bits), bits.shape[1] // 8, 8) << places).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first n bits of every row as 0 and 1."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    packed = packed[:, : (n + 7) // 8]
    return ((packed[..., None] >> places) & 1).view(len(packed), packed.shape[1] * 8)[:, :n]


projection = Projection(TorchSteps)
relu_projection_forward = projection.relu_projection_forward
relu_projection_backward = projection.relu_projection_backward
