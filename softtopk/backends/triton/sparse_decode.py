"""The outputs of a sparse code in Triton: a program per row and tile of the output.

A tile is so narrow that a warp reads 16 bytes a thread of a row of the weight, AHEAD rows at a time, and
programs of one tile are neighbours, so that the weight's columns of that tile stay in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.triton import launch
from softtopk.backends.triton.sweeps import rounded

AHEAD = 8  # rows of the weight that are read at a time


@triton.jit(do_not_specialize=["places"])
def decode_kernel(
    values, indices, counts, weight, bias, out, places, d,
    AHEAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T: tl.constexpr = values.dtype.element_ty
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < d
    values += row * places
    indices += row * places
    number = tl.minimum(tl.load(counts + row), places)
    total = tl.zeros([TILE], T)
    start = tl.zeros((), tl.int32)
    while start < number:
        for ahead in tl.static_range(AHEAD):
            j = start + ahead
            value = tl.load(values + j, mask=j < number, other=0)
            latent = tl.load(indices + j, mask=j < number, other=0).to(tl.int64)
            entry = tl.load(weight + latent * d + column, mask=inside & (j < number), other=0)
            total += value * entry.to(T)
        start += AHEAD
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0).to(T)
    tl.store(out + row * d + column, rounded(total, out.dtype.element_ty), mask=inside)


def decode(values: Tensor, indices: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """sum_j values_j weight[indices_j] + bias, (rows, d) in weight's dtype."""
    rows, places = values.shape
    d = weight.shape[1]
    out = weight.new_empty((rows, d))
    if out.numel() > 0:
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        tile, warps = launch.columns(d, weight.element_size())
        arguments = (values.contiguous(), indices.contiguous(), counts, weight, bias, out, places, d)
        with launch.on_device(weight):
            decode_kernel[rows, triton.cdiv(d, tile)](
                *arguments, AHEAD=min(AHEAD, triton.next_power_of_2(places)), TILE=tile, num_warps=warps
            )
    return out
