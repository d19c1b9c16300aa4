"""Which backend runs a call: the argument, else SOFTTOPK_BACKEND, else the tensor's device."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

# Name -> (module, device types it runs on, None for all). Order is the order of preference.
BACKENDS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "cuda": ("softtopk.backends.cuda", ("cuda",)),
    "triton": ("softtopk.backends.triton", ("cuda",)),
    "cpu": ("softtopk.backends.cpu", ("cpu",)),
    "reference": ("softtopk.backends.reference", None),
}

# Where a backend's functions for sparse codes are a module of their own; elsewhere they are its `sparse`.
SPARSE_MODULES = {
    "triton": "softtopk.backends.triton.sparse",
    "reference": "softtopk.backends.reference_sparse",
}


class BackendUnavailable(RuntimeError):
    """The backend exists but cannot run here; the message says why and how to get it."""


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The backend's module and None, or None and the reason that it is absent."""
    try:
        return importlib.import_module(BACKENDS[name][0]), None
    except ImportError as error:  # each backend module raises ImportError with its own reason
        return None, str(error)


def available_backends() -> dict[str, str | None]:
    """Every backend's name with None when it can run here, or the reason why it cannot.

    >>> import softtopk
    >>> softtopk.available_backends()["reference"] is None
    True
    """
    return {name: load(name)[1] for name in BACKENDS}


def choose(backend: str | None, device: torch.device) -> str:
    """The name of the backend for tensors on `device`.

    Raises ValueError for an unknown name or one that does not run on the device's type, and
    BackendUnavailable for a backend that is not there.
    """
    asked = backend if backend is not None else os.environ.get("SOFTTOPK_BACKEND") or None
    if asked is None:
        return default(device.type)
    source = "backend" if backend is not None else "SOFTTOPK_BACKEND"
    if asked not in BACKENDS:
        raise ValueError(f"{source}={asked!r} is unknown; choose one of {', '.join(BACKENDS)}")
    module, reason = load(asked)
    if module is None:
        raise BackendUnavailable(f"{source}={asked!r} is not available: {reason}")
    if not runs_on(asked, device.type):
        raise ValueError(f"{source}={asked!r} does not run on device {str(device)!r}")
    return asked


@functools.cache
def default(device_type: str) -> str:
    """The most preferred backend that is available for a device type."""
    fits = (b for b, (_, devices) in BACKENDS.items() if devices is None or device_type in devices)
    return next(b for b in fits if load(b)[0] is not None)


def runs_on(name: str, device_type: str) -> bool:
    """Whether a backend that was asked for by name takes tensors of a device type."""
    devices = BACKENDS[name][1]
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return True  # the interpreter runs on host memory
    return devices is None or device_type in devices


def module(name: str) -> ModuleType:
    """The loaded module of an available backend."""
    return load(name)[0]


def kernels(backend: str | None, device: torch.device) -> ModuleType:
    """The module that runs a call; raises as `choose` does."""
    return module(choose(backend, device))


def sparse_kernels(backend: str | None, device: torch.device) -> Any:
    """What has the functions of backends/reference_sparse.py of the backend that `kernels` would choose."""
    return sparse_part(choose(backend, device))


@functools.cache
def sparse_part(name: str) -> Any:
    return importlib.import_module(SPARSE_MODULES[name]) if name in SPARSE_MODULES else module(name).sparse
