"""The three steps of backends/projection.py on csrc/cuda/relu_projection.cu."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from softtopk.backends.native import TYPES


class NativeSteps:
    """`where` gives the device and the stream of a tensor."""

    def __init__(self, launchers: ModuleType, where: Callable[[Tensor], tuple[int, ...]]):
        self.launchers, self.where = launchers, where

    def relu_dot(self, z: Tensor, w2: Tensor, add: bool, scores: Tensor, mask: Tensor) -> None:
        self.launchers.relu_dot(
            z.data_ptr(),
            TYPES[z.dtype],
            *z.shape,
            z.stride(0),
            w2.data_ptr(),
            add,
            scores.data_ptr(),
            mask.data_ptr(),
            mask.stride(0),
            *self.where(z),
        )

    def expand_mask(self, mask: Tensor, g: Tensor, expanded: Tensor) -> Tensor:
        rows, columns = expanded.shape
        sums = g.new_empty(self.launchers.expand_mask_parts(rows), columns)
        self.launchers.expand_mask(
            mask.data_ptr(),
            mask.stride(0),
            rows,
            columns,
            TYPES[expanded.dtype],
            g.data_ptr(),
            expanded.data_ptr(),
            expanded.stride(0),
            sums.data_ptr(),
            *self.where(g),
        )
        return sums

    def scale_gradient(
        self,
        products: Tensor,
        weight: Tensor,
        bias: Tensor,
        w2: Tensor,
        sums: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
        grad_w2: Tensor,
        squares: Tensor | None,
    ) -> None:
        self.launchers.scale_gradient(
            products.data_ptr(),
            weight.data_ptr(),
            TYPES[weight.dtype],
            bias.data_ptr(),
            w2.data_ptr(),
            sums.data_ptr(),
            sums.stride(0),
            len(sums),
            *weight.shape,
            grad_weight.data_ptr(),
            TYPES[grad_weight.dtype],
            grad_bias.data_ptr(),
            grad_w2.data_ptr(),
            0 if squares is None else squares.data_ptr(),
            *self.where(weight),
        )
