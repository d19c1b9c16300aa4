"""The C++ backend: csrc/cpu, on torch's number of threads."""

import torch

from softtopk.backends.native import _C, Kernels, reads
from softtopk.backends.projection import relu_projection_backward, relu_projection_forward

kernels = Kernels(_C.cpu, lambda x: (torch.get_num_threads(),), log_needs_solution=False)
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
