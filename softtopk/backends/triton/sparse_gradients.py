"""Per latent, in Triton: the gradient of its row of a weight and what else comes of its entries.

A program takes one latent and a tile of the columns, so that the latent's row of the weight is read once
and every row of the gradient is written once. A latent of more than CHUNK entries, such as one that is
active in every row, would keep its program busy alone: its chunks are programs of their own, whose
sums, in float32 or float64, another adds up in order. Nothing is added atomically: equal inputs give
equal bits.
The first place to look: `latent_gradients` of backends/reference_sparse.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtopk.backends.triton import launch
from softtopk.backends.triton.sweeps import rounded

CHUNK = 256  # entries
AHEAD = 4  # entries that are read at a time


@triton.jit
def entry_sums(
    scale, entries, first, end, y, weight, dots, latent, places, d, column, inside,
    T: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sums of scale y, (TILE,), and of scale over entries first ... end - 1; stores the dots."""
    total = tl.zeros([TILE], T)
    factors = tl.zeros([AHEAD], T)
    if weight is not None:
        w = tl.load(weight + latent * d + column, mask=inside & (first < end), other=0).to(T)
    while first < end:
        i = first + tl.arange(0, AHEAD)
        place = tl.load(entries + i, mask=i < end, other=0)
        factor = tl.load(scale + place, mask=i < end, other=0)
        row = (place // places).to(tl.int64)
        here = y + row[:, None] * d + column[None, :]
        tile = tl.load(here, mask=(i < end)[:, None] & inside[None, :], other=0).to(T)
        total += tl.sum(factor[:, None] * tile, 0)
        factors += factor
        if weight is not None:
            tl.store(dots + place, tl.sum(w[None, :] * tile, 1), mask=i < end)
        first += AHEAD
    return total, tl.sum(factors)


@triton.jit(do_not_specialize=["places", "number", "n"])
def chunk_kernel(
    scale, offsets, entries, ends, latents, y, weight, dots, partial, partial_sums, places, number, n, d,
    CHUNK: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sums of one chunk of a long latent, into its slot."""
    slot = tl.program_id(0).to(tl.int64)
    T: tl.constexpr = scale.dtype.element_ty
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    latent = tl.load(latents + slot).to(tl.int64)
    if latent < n:
        begin = tl.load(offsets + latent)
        last = tl.load(offsets + latent + 1)
        left = (tl.load(ends + latent) - slot).to(tl.int32)  # this chunk and those behind it
        first = begin + ((last - begin + CHUNK - 1) // CHUNK - left) * CHUNK
        if weight is not None:
            dots += tl.program_id(1).to(tl.int64) * number
        total, factors = entry_sums(
            scale, entries, first, tl.minimum(first + CHUNK, last), y, weight, dots, latent, places, d,
            column, column < d, T, AHEAD, TILE,
        )  # fmt: skip
        tl.store(partial + slot * d + column, total, mask=column < d)
        if tl.program_id(1) == 0:
            tl.store(partial_sums + slot, factors)


@triton.jit(do_not_specialize=["places", "number", "n"])
def latent_kernel(
    scale, offsets, entries, ends, y, weight, dots, partial, partial_sums, grad, sums, squares,
    places, number, n, d,
    ZERO_SILENT: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of a latent's row of the gradient, and what it adds to the latent's square."""
    latent = tl.program_id(0).to(tl.int64)
    T: tl.constexpr = scale.dtype.element_ty
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < d
    begin = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)
    if weight is not None:
        dots += tl.program_id(1).to(tl.int64) * number
    short = end - begin <= CHUNK
    total, factors = entry_sums(
        scale, entries, begin, tl.where(short, end, begin), y, weight, dots, latent, places, d,
        column, inside, T, AHEAD, TILE,
    )  # fmt: skip
    if ends is not None:
        chunks = tl.where(short, 0, (end - begin + CHUNK - 1) // CHUNK)
        slot = tl.load(ends + latent) - chunks
        while chunks > 0:
            total += tl.load(partial + slot * d + column, mask=inside, other=0)
            factors += tl.load(partial_sums + slot)
            slot += 1
            chunks -= 1
    written = inside if ZERO_SILENT else inside & (end > begin)
    tl.store(grad + latent * d + column, rounded(total, grad.dtype.element_ty), mask=written)
    if squares is not None:
        tl.store(squares + tl.program_id(1).to(tl.int64) * n + latent, tl.sum(total * total))
    if sums is not None:
        tl.store(sums + latent, factors, mask=tl.program_id(1) == 0)


@triton.jit
def project_kernel(
    raw, weight, offsets, grad, squares, d,
    ZERO_SILENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of the gradient without its part along the weight's row, and its square. `raw` may be `grad`."""
    latent = tl.program_id(0).to(tl.int64)
    T: tl.constexpr = raw.dtype.element_ty
    width = tl.zeros((), tl.int32) + d
    if not ZERO_SILENT:
        silent = tl.load(offsets + latent) == tl.load(offsets + latent + 1)
        width = tl.where(silent, 0, width)
    part = tl.zeros([BLOCK], T)
    start = tl.zeros((), tl.int32)
    while start < width:
        column = start + tl.arange(0, BLOCK)
        w = tl.load(weight + latent * d + column, mask=column < d, other=0).to(T)
        part += tl.load(raw + latent * d + column, mask=column < d, other=0) * w
        start += BLOCK
    along = tl.sum(part)
    part = tl.zeros([BLOCK], T)
    start = tl.zeros((), tl.int32)
    while start < width:
        column = start + tl.arange(0, BLOCK)
        w = tl.load(weight + latent * d + column, mask=column < d, other=0).to(T)
        g = tl.load(raw + latent * d + column, mask=column < d, other=0) - along * w
        part += g * g
        tl.store(grad + latent * d + column, rounded(g, grad.dtype.element_ty), mask=column < d)
        start += BLOCK
    if squares is not None:
        tl.store(squares + latent, tl.sum(part))


def long_latents(offsets: Tensor, number: int) -> tuple[Tensor | None, Tensor | None]:
    """(ends, latents) of the chunks of latents with more than CHUNK of at most `number` entries: those of
    latent l are slots up to ends[l] - 1, and slot s belongs to latent latents[s], n where to none. (None,
    None) where there cannot be any. Shapes follow from those given: the host does not wait."""
    n = len(offsets) - 1
    slots = number // CHUNK + min(n, number // (CHUNK + 1))
    if number <= CHUNK:
        return None, None
    counts = offsets.diff()
    chunks = torch.where(counts > CHUNK, (counts + (CHUNK - 1)) // CHUNK, 0)
    ends = chunks.cumsum(0)
    slot = torch.arange(slots, device=offsets.device)
    return ends, torch.searchsorted(ends, slot, right=True, out_int32=True)


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
    """grad (n, d), dots (rows, C) or None, sums (n,) or None, squares (n,) or None."""
    n, d, T = len(offsets) - 1, y.shape[1], scale.dtype
    number, places = scale.numel(), scale.shape[1]
    scale, y = scale.contiguous(), y.contiguous()
    weight = None if weight is None else weight.contiguous()
    tile, _ = launch.columns(d, y.element_size(), most=256)
    tiles = triton.cdiv(d, tile)
    grad = y.new_empty((n, d), dtype=out_dtype)
    raw = grad if not project or out_dtype == T else torch.empty_like(grad, dtype=T)
    dots = None if weight is None else scale.new_zeros((tiles, number))
    sums = scale.new_empty(n) if want_sums else None
    parts = scale.new_empty((tiles, n)) if want_squares and not project else None
    ends, latents = long_latents(offsets, number)
    partial = partial_sums = None
    options = dict(CHUNK=CHUNK, AHEAD=AHEAD, TILE=tile, num_warps=1)
    with launch.on_device(y):
        if latents is not None:
            partial, partial_sums = scale.new_empty((len(latents), d)), scale.new_empty(len(latents))
            arguments = (scale, offsets, entries, ends, latents, y, weight, dots, partial, partial_sums)
            chunk_kernel[len(latents), tiles](*arguments, places, number, n, d, **options)
        arguments = (scale, offsets, entries, ends, y, weight, dots, partial, partial_sums, raw, sums, parts)
        latent_kernel[n, tiles](*arguments, places, number, n, d, ZERO_SILENT=zero_silent, **options)
        squares = None if parts is None else parts.sum(0)
        if project:
            squares = scale.new_empty(n) if want_squares else None
            block = min(1024, triton.next_power_of_2(d))
            arguments = (raw, weight, offsets, grad, squares, d)
            project_kernel[(n,)](*arguments, ZERO_SILENT=zero_silent, BLOCK=block, num_warps=4)
    dots = None if dots is None else dots.sum(0).view_as(scale)
    return grad, dots, sums, squares
