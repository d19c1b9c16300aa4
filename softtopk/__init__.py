"""Differentiable top-k (LapSum) at the speed of memory, with a learnable k for every row."""

from softtopk.dispatch import BackendUnavailable, available_backends
from softtopk.functional import hard_topk, log_soft_topk, soft_topk
from softtopk.modules import SoftTopK
from softtopk.projection import relu_projection

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "SoftTopK",
    "available_backends",
    "hard_topk",
    "log_soft_topk",
    "relu_projection",
    "soft_topk",
]
