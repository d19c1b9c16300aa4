"""Differentiable top-k (LapSum) at the speed of memory, with a learnable k for every row."""

from softtopk.dispatch import BackendUnavailable, available_backends
from softtopk.functional import hard_topk, log_soft_topk, soft_topk
from softtopk.modules import SoftTopK
from softtopk.projection import relu_projection
from softtopk.sparse import (
    encode_hard_topk,
    encode_soft_topk,
    hard_topk_code,
    soft_topk_code,
    soft_topk_decode,
    sparse_decode,
)
from softtopk.sparse_code import SparseCode

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "SoftTopK",
    "SparseCode",
    "available_backends",
    "encode_hard_topk",
    "encode_soft_topk",
    "hard_topk",
    "hard_topk_code",
    "log_soft_topk",
    "relu_projection",
    "soft_topk",
    "soft_topk_code",
    "soft_topk_decode",
    "sparse_decode",
]
