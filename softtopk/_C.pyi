"""The native module (csrc/bindings.cpp). Addresses, streams, and softtopk.h's Type and Form are integers."""

from typing import TypeAlias

Rows: TypeAlias = tuple[int, int, int, int, int, bool]  # data, type, rows, n, stride, largest
PerRow: TypeAlias = tuple[int, int, int, float]  # data (0: take the number), type, stride, number

has_cuda: bool
cuda_architectures: str  # as "80;90;120+PTX"; empty without CUDA
cuda_reason: str  # why CUDA was not built; empty with it

class cpu:
    @staticmethod
    def soft_topk_forward(
        x: Rows, k: PerRow, alpha: PerRow, form: int, out: int, solution: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def soft_topk_backward(
        x: Rows,
        solution: int,
        alpha: PerRow,
        form: int,
        v: int,
        v_stride: int,
        grad_x: int,
        grad_k: int,
        grad_alpha: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def hard_topk_mask(x: Rows, k: PerRow, mask: int, threads: int, /) -> None: ...
    @staticmethod
    def hard_topk_indices(
        x: Rows, k: PerRow, max_k: int, indices: int, counts: int, threads: int, /
    ) -> None: ...

class cuda:
    @staticmethod
    def soft_topk_forward(
        x: Rows, k: PerRow, alpha: PerRow, form: int, out: int, solution: int, device: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def soft_topk_backward(
        x: Rows,
        solution: int,
        alpha: PerRow,
        form: int,
        v: int,
        v_stride: int,
        grad_x: int,
        grad_k: int,
        grad_alpha: int,
        device: int,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def hard_topk_mask(x: Rows, k: PerRow, mask: int, device: int, stream: int, /) -> None: ...
    @staticmethod
    def hard_topk_indices(
        x: Rows, k: PerRow, max_k: int, indices: int, counts: int, device: int, stream: int, /
    ) -> None: ...
