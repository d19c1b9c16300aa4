"""Which calls go to a native backend directly, and not through the dispatcher to the operators of ops.py.

On a small problem the dispatcher's way to a Python operator and back takes ten times as long as the
kernel. A call takes the short way where nothing but the kernel would see the operator: ordinary
contiguous tensors, and no mode, transform, trace or profiler in this thread. Its result is the same.
"""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.compiler import is_compiling

from softtopk import dispatch

try:
    from softtopk._C import direct as native_part  # csrc/direct.cpp
except ImportError:  # and so there is no native backend
    native_part = None


def raw(*keys: DispatchKey) -> int:
    return functools.reduce(DispatchKeySet.__or__, map(DispatchKeySet, keys)).raw_repr()


# The dispatch keys of a thread that is in no torch-dispatch mode, transform of torch.func or trace, and of
# a tensor that is what its memory holds, with its device. Each also as in torch.inference_mode.
QUIET = {raw(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView), raw(DispatchKey.BackendSelect)}
PLAIN = {
    raw(getattr(DispatchKey, name), getattr(DispatchKey, f"Autocast{name}"), *tape): name.lower()
    for name in ("CPU", "CUDA")
    for tape in ((), (DispatchKey.ADInplaceOrView, getattr(DispatchKey, f"Autograd{name}")))
}


def kernels(backend: str | None, x: Tensor, *values: float | Tensor):
    """The native backend (backends/native.py's Kernels) that takes x (..., n) and values per row (...) as
    they lie; None for a call that has to go through the operator. Raises as `dispatch.choose` does."""
    if not alone() or (device_type := plain(x)) is None or not x.is_contiguous():
        return None
    for value in values:
        if type(value) is not float and (plain(value) is None or not strides_fit(value)):
            return None
    found = default(device_type)
    if found is not None and (backend is not None or native_part.backend_is_set()):
        found = native(dispatch.kernels(backend, x.device))
    return found


@functools.cache
def default(device_type: str):
    """The preferred backend of a device type where it is a native one, or None."""
    return native(dispatch.module(dispatch.default(device_type)))


def native(module: ModuleType):
    """The Kernels that a native backend's module consists of; None for another backend."""
    return getattr(module, "kernels", None)


def alone() -> bool:
    """Whether this thread runs operators eagerly, with nothing between the caller and their kernels."""
    # A compiler reads no further than the first.
    return not is_compiling() and native_part is not None and native_part.alone()


def plain(t: Tensor) -> str | None:
    """The device type of a tensor of no subclass that is no wrapper and has no sign or zero that is only
    noted; None for any other."""
    return native_part.plain(t)


def strides_fit(value: Tensor) -> bool:
    """Whether native.per_row reads a value per row (...): in a row, contiguous, or one for all rows."""
    return value.dim() == 1 or value.is_contiguous() or not any(value.stride())


if native_part is not None:
    native_part.bind(QUIET, PLAIN, default)

# soft_topk(x, k, alpha, dim, largest): p, from arguments that nobody has checked, of a call that is `alone`
# and needs no gradient, whose x is `plain` and contiguous, with the selection along its last dimension and a
# native default backend, and whose k and alpha are numbers or such tensors of float32 or float64, of x's
# shape without the last dimension or of none. None for any other call, and for one that has to raise. A
# compiler cannot read it.
soft_topk = native_part.soft_topk if native_part is not None else lambda *arguments: None
