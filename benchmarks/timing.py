"""Median times on the GPU by events and on the CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice

import torch

Call = Callable[[], object]


def median_ms(
    calls: Call | list[Call], device: str, budget_s: float = 0.2, least: int = 10, most: int = 30
) -> float:
    """Median milliseconds of a call, after two warm-up calls, over about `budget_s` seconds.

    On the GPU every call lies between two events of one stream. The caller sees to it that the data
    is larger than the L2 cache or that `calls`, taken in turn, read different data, so that memory is
    what is read.
    """
    turn = cycle(calls if isinstance(calls, list) else [calls])
    next(turn)()
    if device == "cpu":
        once = clock_ms(next(turn))
        count = max(min(least, 3), min(most, int(budget_s * 1e3 / max(once, 1e-6))))
        return statistics.median(clock_ms(call) for call in islice(turn, count))
    torch.cuda.synchronize()
    once = event_ms([next(turn)])[0]
    count = max(least, min(most, int(budget_s * 1e3 / max(once, 1e-3))))
    return statistics.median(event_ms(list(islice(turn, count))))


def clock_ms(call: Call) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def event_ms(calls: list[Call]) -> list[float]:
    """Milliseconds of each call, all queued at once."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    for (begin, end), call in zip(events, calls, strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def row_of_calls_ms(calls: list[Call], repeats: int = 7) -> float:
    """Milliseconds of one call in a row of calls without a pause: of the slower of host and device."""

    def one_after_the_other() -> None:
        for call in calls:
            call()

    one_after_the_other()
    torch.cuda.synchronize()
    times = [event_ms([one_after_the_other])[0] for _ in range(repeats)]
    return statistics.median(times) / len(calls)


def graph_ms(calls: list[Call], repeats: int = 7) -> float:
    """Milliseconds of one call in a row of calls that a CUDA graph replays: what the device needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = [event_ms([graph.replay])[0] for _ in range(repeats)]
    return statistics.median(times) / len(calls)


def host_ms(call: Call, count: int = 100, repeats: int = 7) -> float:
    """Milliseconds that a call holds the host up; `count` calls fit into the device's queue."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - started) * 1e3 / count)
    torch.cuda.synchronize()
    return statistics.median(times[1:])
