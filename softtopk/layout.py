"""From tensors of any rank and strides to the 2-D rows that kernels read, without large copies.

Kernels take rows (rows, n) and return contiguous results. Where x can be seen that way it is passed
as it lies. Any other view (a dimension that is not the last, every second element, an expanded
number) goes through in slabs: a part of the rows is copied, computed and written to its place in
the result, so that the extra memory is a few times SLAB_BYTES whatever the size of x.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SLAB_BYTES = 1 << 25

# A kernel on 2-D tensors: the elements (rows, n) and the per-row values (rows,) or (rows, m) of a
# call to the same of its results, whose elements are of the first argument's dtype.
Kernel = Callable[[list[Tensor], list[Tensor | None]], tuple[list[Tensor], list[Tensor]]]


def by_rows(
    kernel: Kernel,
    reads: Callable[[Tensor], bool],
    elements: list[Tensor],  # each (..., n), of any strides
    per_row: list[Tensor | None],  # each (...) or (..., m)
) -> tuple[list[Tensor], list[Tensor]]:
    """The kernel's results for all rows: elements of the strides of torch.empty_like(elements[0]), per-row
    values contiguous.

    `reads(rows)` says whether the kernel reads a 2-D view as it lies.
    """
    x = elements[0]
    if in_order(x):
        rows = [as_rows(t) for t in elements]
        if all(r is not None and reads(r) for r in rows):
            outputs, values = kernel(rows, [flat(t, x) for t in per_row])
            if x.dim() == 2:
                return outputs, values
            return (
                [t.view(x.shape) for t in outputs],
                [t.view(x.shape[:-1] + t.shape[1:]) for t in values],
            )
    return slab_by_slab(kernel, elements, per_row)


def slab_by_slab(kernel: Kernel, elements: list[Tensor], per_row: list[Tensor | None]):
    x = elements[0]
    outputs: list[Tensor] = []
    values: list[Tensor] = []
    for index in slabs(x):
        part = x[index]
        new_outputs, new_values = kernel(
            [t[index].reshape(part.shape[:-1].numel(), t.shape[-1]) for t in elements],
            [None if t is None else flat(t[index], part) for t in per_row],
        )
        if not outputs and not values:  # their number and dtypes are known now
            outputs = [torch.empty_like(x) for _ in new_outputs]
            values = [t.new_empty(x.shape[:-1] + t.shape[1:]) for t in new_values]
        for whole, new in zip(outputs + values, new_outputs + new_values, strict=True):
            whole[index].copy_(new.view(whole[index].shape))
    return outputs, values


def slabs(x: Tensor) -> Iterator[tuple]:
    """Indices of parts of x (..., n), in order, each of at most SLAB_BYTES or one row; one for an empty x."""
    shape = x.shape[:-1]
    size = max(1, x.shape[-1] * x.element_size())
    split = len(shape)  # the first dimension of which several indices fit into a slab
    while split > 0 and size * max(1, shape[split - 1]) <= SLAB_BYTES:
        split -= 1
        size *= max(1, shape[split])
    if split == 0 or x.numel() == 0:
        yield (...,)
        return
    step = max(1, SLAB_BYTES // size)
    for outer in itertools.product(*(range(length) for length in shape[: split - 1])):
        for start in range(0, shape[split - 1], step):
            yield (*outer, slice(start, start + step))


def in_order(x: Tensor) -> bool:
    """Whether a result with the strides of torch.empty_like(x) is contiguous."""
    return x.is_contiguous() or torch.empty_like(x, device="meta").is_contiguous()


def as_rows(x: Tensor) -> Tensor | None:
    """x (..., n) as a 2-D view, or None where there is none."""
    if x.dim() == 2:
        return x
    try:
        return x.view(x.shape[:-1].numel(), x.shape[-1])
    except RuntimeError:
        return None


def flat(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A value per row of x, (...) or (..., m), as (rows,) or (rows, m)."""
    return None if t is None else t.reshape((x.shape[:-1].numel(),) + t.shape[x.dim() - 1 :])
