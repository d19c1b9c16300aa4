"""Which calls go to a native backend directly, and not through the dispatcher to the operators of ops.py.

On a small problem the dispatcher's way to a Python operator and back takes ten times as long as the
kernel. A call takes the short way where nothing but the kernel would see the operator: ordinary
contiguous tensors, and no mode, transform, trace or profiler in this thread. Its result is the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from softtopk import dispatch

PRE_DISPATCH = DispatchKey.PreDispatch


def kernels(backend: str | None, x: Tensor, *values: float | Tensor):
    """The native backend (backends/native.py's Kernels) that takes x (..., n) and values per row (...) as
    they lie; None for a call that has to go through the operator. Raises as `dispatch.choose` does."""
    if not (alone() and plain(x) and x.is_contiguous()):
        return None
    found = default("cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type)
    if found is None:
        return None
    if backend is not None or found.backend_is_set():
        found = getattr(dispatch.kernels(backend, x.device), "kernels", None)
    for value in values:
        if type(value) is not float and not (plain(value) and strides_fit(value)):
            return None
    return found


@functools.cache
def default(device_type: str):
    """The preferred backend of a device type where it is a native one, or None."""
    return getattr(dispatch.module(dispatch.default(device_type)), "kernels", None)


def alone() -> bool:
    """Whether this thread runs operators eagerly, with nothing between the caller and their kernels."""
    return not (
        torch.compiler.is_compiling()  # first: a compiler reads no further
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_tracing()
        or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)
        or profiler._is_profiler_enabled
    )


def plain(t: Tensor) -> bool:
    """Whether t is what its memory holds: no subclass, no wrapper, no sign or zero that is only noted."""
    kind = type(t)
    return (
        (kind is Tensor or kind is Parameter)
        and not is_functorch_wrapped_tensor(t)
        and not t.is_neg()
        and t.data_ptr() != 0  # 0 for an empty, meta, functional or efficient zero tensor
    )


def strides_fit(value: Tensor) -> bool:
    """Whether native.per_row reads a value per row (...): in a row, contiguous, or one for all rows."""
    return value.dim() == 1 or value.is_contiguous() or not any(value.stride())
