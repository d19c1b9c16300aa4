"""The C++ backend: csrc/cpu, on torch's number of threads."""

import torch
from torch import Tensor

from softtopk.backends.native import _C, Kernels, reads
from softtopk.backends.native_sparse import SparseKernels
from softtopk.backends.projection import relu_projection_backward, relu_projection_forward


def threads(x: Tensor) -> tuple[int]:
    return (torch.get_num_threads(),)


kernels = Kernels(_C.cpu, threads, log_needs_solution=False)
sparse = SparseKernels(_C.cpu, threads)
__all__ = [
    "hard_topk_indices",
    "hard_topk_mask",
    "reads",
    "relu_projection_backward",
    "relu_projection_forward",
    "soft_topk_backward",
    "soft_topk_forward",
]
soft_topk_forward = kernels.soft_topk_forward
soft_topk_backward = kernels.soft_topk_backward
hard_topk_mask = kernels.hard_topk_mask
hard_topk_indices = kernels.hard_topk_indices
