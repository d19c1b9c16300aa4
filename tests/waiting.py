"""Steps on a GPU in which the host waits for nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def record(step: Callable) -> tuple[torch.cuda.CUDAGraph, object]:
    """The CUDA graph of a step, taken before once without waiting, and the results that it fills."""
    step()
    with waiting_is_an_error():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
