"""The Triton backend: the same four functions as backends/reference.py, one program per row.

A row is kept in registers where it fits, and swept in chunks otherwise; nothing is sorted, no host
synchronisation, atomic or inline assembly is used, and no scratch memory but the output. With
SOFTTOPK_AUTOTUNE=1 in the environment tile sizes are measured on first use and remembered, see
autotune.py. With TRITON_INTERPRET=1 there before triton is first imported, the kernels run on the
CPU, slowly, for tests. The sparse path is in sparse.py.
"""

from __future__ import annotations

import os

import torch

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"triton cannot be imported ({error}); CUDA builds of torch bring it, else pip install triton"
    ) from error

if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    raise ImportError(
        "no GPU is visible to torch; to run the kernels slowly on the CPU, set TRITON_INTERPRET=1"
        " in the environment before python starts"
    )

from softtopk.backends.triton.hard_topk import hard_topk_indices, hard_topk_mask  # noqa: E402
from softtopk.backends.triton.launch import reads  # noqa: E402
from softtopk.backends.triton.projection import (  # noqa: E402
    relu_projection_backward,
    relu_projection_forward,
)
from softtopk.backends.triton.soft_topk import soft_topk_backward, soft_topk_forward  # noqa: E402

__all__ = [
    "hard_topk_indices",
    "hard_topk_mask",
    "reads",
    "relu_projection_backward",
    "relu_projection_forward",
    "soft_topk_backward",
    "soft_topk_forward",
]
