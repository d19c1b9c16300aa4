"""Shared fixtures: GPU tests skip without a GPU, Triton interprets there, uninitialised memory is NaN."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for every core: their threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton at import

import softtopk


def device_of(backend: str) -> str:
    """Where a backend's tests run: on the GPU for cuda and, when there is one, triton."""
    gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return "cuda" if gpu else "cpu"


def skip_if_slow(backend: str, device: str, small: bool):
    if backend == "triton" and device == "cpu" and not small:
        pytest.skip("too slow in Triton's interpreter")


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def backend(request) -> str:
    """The name of each backend in turn, skipped with its reason where it is not there."""
    reason = softtopk.available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend) -> str:
    return device_of(backend)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(request):
    """torch.empty and its relatives return NaN: an element that a kernel does not write is seen."""
    # softsae: whole models, the same kernels, only slower.
    if "softsae" in request.path.parts or request.config.getoption("--no-poison"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # switches the filling on
    yield
    torch.use_deterministic_algorithms(before)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz", type=int, default=0, metavar="N", help="random rows per backend in test_fuzz.py"
    )
    parser.addoption("--no-poison", action="store_true", help="for initcheck, which filling blinds")
    parser.addoption("--fuzz-seed", type=int, default=0, metavar="S", help="the seed of the first batch")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
