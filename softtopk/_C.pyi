"""The native module (csrc/bindings.cpp). Addresses, streams, and softtopk.h's enumerations are integers.

A value per row is read from its address or, where that is 0, is the number.
"""

from collections.abc import Callable

from torch import Tensor

from softtopk.backends.native import Kernels

has_cuda: bool
cuda_architectures: str  # as "80;90;120+PTX"; empty without CUDA
cuda_reason: str  # why CUDA was not built; empty with it

class direct:  # csrc/direct.cpp; softtopk/direct.py says what these are
    @staticmethod
    def bind(quiet: set[int], plain: dict[int, str], default: Callable[[str], Kernels | None], /) -> None: ...
    @staticmethod
    def alone() -> bool: ...
    @staticmethod
    def plain(t: Tensor, /) -> str | None: ...
    @staticmethod
    def backend_is_set() -> bool: ...  # whether SOFTTOPK_BACKEND is there and not empty
    @staticmethod
    def soft_topk(
        x: Tensor, k: float | Tensor, alpha: float | Tensor, dim: int, largest: bool, /
    ) -> Tensor | None: ...  # fmt: skip

class cpu:
    @staticmethod
    def soft_topk_forward(
        x: int, x_type: int, rows: int, n: int, x_stride: int, largest: bool,
        k: int, k_type: int, k_stride: int, k_number: float,
        alpha: int, alpha_type: int, alpha_stride: int, alpha_number: float,
        form: int, out: int, solution: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def soft_topk_backward(
        x: int, x_type: int, rows: int, n: int, x_stride: int, largest: bool,
        solution: int,
        alpha: int, alpha_type: int, alpha_stride: int, alpha_number: float,
        form: int, v: int, v_stride: int, grad_x: int, grad_k: int, grad_alpha: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def hard_topk_mask(
        x: int, x_type: int, rows: int, n: int, x_stride: int, largest: bool,
        k: int, k_type: int, k_stride: int, k_number: float,
        mask: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def hard_topk_indices(
        x: int, x_type: int, rows: int, n: int, x_stride: int, largest: bool,
        k: int, k_type: int, k_stride: int, k_number: float,
        max_k: int, indices: int, values: int, counts: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def select_workspace(rows: int, n: int, type: int, /) -> int: ...  # bytes
    @staticmethod
    def code_forward(
        z: int, z_type: int, rows: int, n: int, z_stride: int, largest: bool,
        k: int, k_type: int, k_stride: int, k_number: float,
        alpha: int, alpha_type: int, alpha_stride: int, alpha_number: float,
        bias: int, thresholds: int, threshold: float, mode: int,
        values: int, indices: int, active: int, counts: int, state: int, max_active: int,
        workspace: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def code_backward(
        compute: int, rows: int, max_active: int, active: int, values: int, counts: int, state: int,
        alpha: int, alpha_type: int, alpha_stride: int, alpha_number: float,
        g: int, selection_gradient: float, grad_active: int, grad_k: int, grad_alpha: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def transpose_workspace(rows: int, max_active: int, n: int, /) -> int: ...  # bytes
    @staticmethod
    def transpose(
        indices: int, counts: int, rows: int, max_active: int, n: int,
        offsets: int, entries: int, workspace: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def decode(
        values: int, indices: int, counts: int, rows: int, max_active: int,
        weight: int, weight_type: int, n: int, d: int, bias: int, out: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def gradients_workspace(
        type: int, rows: int, max_active: int, n: int, d: int, dots: bool, squares: bool, /
    ) -> int: ...  # bytes
    @staticmethod
    def latent_gradients(
        scale: int, indices: int, offsets: int, entries: int, rows: int, max_active: int, n: int, d: int,
        y: int, weight: int, y_type: int, out_type: int, project: bool, zero_silent: bool,
        grad: int, dots: int, sums: int, squares: int, workspace: int, threads: int, /,
    ) -> None: ...  # fmt: skip

class cuda:
    @staticmethod
    def soft_topk_forward(
        x: int, x_type: int, rows: int, n: int, x_stride: int, largest: bool,
        k: int, k_type: int, k_stride: int, k_number: float,
        alpha: int, alpha_type: int, alpha_stride: int, alpha_number: float,
        form: int, out: int, solution: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def soft_topk_backward(
        x: int, x_type: int, rows: int, n: int, x_stride: int, largest: bool,
        solution: int,
        alpha: int, alpha_type: int, alpha_stride: int, alpha_number: float,
        form: int, v: int, v_stride: int, grad_x: int, grad_k: int, grad_alpha: int,
        device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def hard_topk_mask(
        x: int, x_type: int, rows: int, n: int, x_stride: int, largest: bool,
        k: int, k_type: int, k_stride: int, k_number: float,
        mask: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def hard_topk_indices(
        x: int, x_type: int, rows: int, n: int, x_stride: int, largest: bool,
        k: int, k_type: int, k_stride: int, k_number: float,
        max_k: int, indices: int, values: int, counts: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def relu_dot(
        z: int, z_type: int, rows: int, columns: int, stride: int, w2: int, add: bool, scores: int,
        mask: int, mask_stride: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def expand_mask_parts(rows: int, /) -> int: ...
    @staticmethod
    def expand_mask(
        mask: int, mask_stride: int, rows: int, columns: int, expanded_type: int, g: int, expanded: int,
        expanded_stride: int, sums: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def scale_gradient(
        products: int, weight: int, weight_type: int, bias: int, w2: int, sums: int, sums_stride: int,
        parts: int, columns: int, d: int, grad_weight: int, grad_type: int, grad_bias: int, grad_w2: int,
        squares: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def adam_flat(
        parameters: int, count: int, found_inf: int, device: int, stream: int, /
    ) -> None: ...  # fmt: skip
    @staticmethod
    def adam_rows(
        parameter: int, gradient: int, exp_avg: int, exp_avg_sq: int, copy: int, rows: int, d: int,
        lr: int, lr_number: float, beta1: float, beta2: float, eps: float,
        step: int, scale: int, found_inf: int, offsets: int, normalize: bool, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def select_workspace(rows: int, n: int, type: int, /) -> int: ...  # bytes
    @staticmethod
    def clip_blocks(size: int, /) -> int: ...
    @staticmethod
    def clip_factors(
        parts: int, count: int, max_norms: int, groups: int, sums: int, out: int, device: int, stream: int, /
    ) -> None: ...  # fmt: skip
    @staticmethod
    def budget_forward(
        score: int, shift: int, scale: float, low: float, high: float, rows: int, k: int,
        device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def budget_backward(
        score: int, shift: int, scale: float, low: float, high: float, g: int, rows: int,
        of_score: int, of_shift: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def budget_excess(
        k: int, rows: int, target: int, target_number: float, beta: float, out: int,
        device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def most_latents() -> int: ...
    @staticmethod
    def latents_activity(
        latents: int, latents_type: int, rows: int, n: int, found: int, device: int, stream: int, /
    ) -> None: ...  # fmt: skip
    @staticmethod
    def codes_activity(
        values: int, values_type: int, indices: int, counts: int, rows: int, max_active: int, n: int,
        found: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def gate_forward(
        a: int, p: int, type: int, cut: float, size: int, out: int, device: int, stream: int, /
    ) -> None: ...  # fmt: skip
    @staticmethod
    def gate_backward(
        a: int, p: int, g: int, type: int, cut: float, rectified: bool, size: int, of_a: int, of_p: int,
        device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def squared_error_blocks(size: int, /) -> int: ...
    @staticmethod
    def squared_error_forward(
        x: int, y: int, y_type: int, rows: int, d: int, sums: int, out: int, device: int, stream: int, /
    ) -> None: ...  # fmt: skip
    @staticmethod
    def squared_error_backward(
        x: int, y: int, y_type: int, rows: int, d: int, g: int, gradient: int, device: int, stream: int, /
    ) -> None: ...  # fmt: skip
    @staticmethod
    def shift_rows(
        x: int, x_type: int, rows: int, d: int, shift: int, scale: int, out: int, out_type: int,
        device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def code_forward(
        z: int, z_type: int, rows: int, n: int, z_stride: int, largest: bool,
        k: int, k_type: int, k_stride: int, k_number: float,
        alpha: int, alpha_type: int, alpha_stride: int, alpha_number: float,
        bias: int, thresholds: int, threshold: float, mode: int,
        values: int, indices: int, active: int, counts: int, state: int, max_active: int,
        workspace: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def code_backward(
        compute: int, rows: int, max_active: int, active: int, values: int, counts: int, state: int,
        alpha: int, alpha_type: int, alpha_stride: int, alpha_number: float,
        g: int, selection_gradient: float, grad_active: int, grad_k: int, grad_alpha: int,
        device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def transpose_workspace(rows: int, max_active: int, n: int, /) -> int: ...  # bytes
    @staticmethod
    def transpose(
        indices: int, counts: int, rows: int, max_active: int, n: int,
        offsets: int, entries: int, workspace: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def decode(
        values: int, indices: int, counts: int, rows: int, max_active: int,
        weight: int, weight_type: int, n: int, d: int, bias: int, out: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
    @staticmethod
    def gradients_workspace(
        type: int, rows: int, max_active: int, n: int, d: int, dots: bool, squares: bool, /
    ) -> int: ...  # bytes
    @staticmethod
    def latent_gradients(
        scale: int, indices: int, offsets: int, entries: int, rows: int, max_active: int, n: int, d: int,
        y: int, weight: int, y_type: int, out_type: int, project: bool, zero_silent: bool,
        grad: int, dots: int, sums: int, squares: int, workspace: int, device: int, stream: int, /,
    ) -> None: ...  # fmt: skip
