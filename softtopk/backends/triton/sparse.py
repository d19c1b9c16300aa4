"""The sparse path of the Triton backend: the functions of backends/reference_sparse.py.

A transposition is a stable sort, for which torch has the same kernel on every GPU, and nothing in it waits
for the device.
"""

from __future__ import annotations

from softtopk.backends.reference_sparse import transpose
from softtopk.backends.triton.sparse_backward import code_backward
from softtopk.backends.triton.sparse_decode import decode
from softtopk.backends.triton.sparse_gradients import latent_gradients
from softtopk.backends.triton.sparse_select import code_forward

__all__ = ["code_backward", "code_forward", "decode", "latent_gradients", "transpose"]
