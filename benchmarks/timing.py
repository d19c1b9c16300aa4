"""Median times on the GPU by events and on the CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_ms(call: Callable[[], object], device: str, budget_s: float = 0.4, most: int = 50) -> float:
    """Median milliseconds of a call, after two warm-up calls, within about `budget_s` seconds.

    On the GPU every call lies between two events of one stream. The caller sees to it that the
    data is larger than the L2 cache, so that a repeated call reads memory.
    """
    call()
    if device == "cpu":
        started = time.perf_counter()
        call()
        once = time.perf_counter() - started
        times = []
        for _ in range(max(3, min(most, int(budget_s / max(once, 1e-9))))):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times)
    torch.cuda.synchronize()
    first = once_ms(call)
    count = max(5, min(most, int(budget_s * 1e3 / max(first, 1e-3))))
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
    ]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def once_ms(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
