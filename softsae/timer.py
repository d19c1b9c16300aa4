"""How long the steps of one trainer take, while others use the same device."""

from __future__ import annotations

import time

import torch


class StepTimer:
    """The seconds spent within it, `with timer: ...`, summed up.

    On a GPU it is the time between two events around the steps on the device's queue, waits for the
    host included; the host waits for nothing until `total` is asked for. Elsewhere it is the host's
    clock.
    """

    MOST_PENDING = 256  # pairs of events that are kept before the host waits for them

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device, self.seconds = device, seconds
        self.pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self):
        self.started = self.mark()

    def __exit__(self, *_):
        ended = self.mark()
        if self.device.type != "cuda":
            self.seconds += ended - self.started
            return
        self.pending.append((self.started, ended))
        if len(self.pending) > self.MOST_PENDING:
            self.drain(len(self.pending) // 2)  # steps that are long done

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def drain(self, count: int):
        for started, ended in self.pending[:count]:
            ended.synchronize()
            self.seconds += started.elapsed_time(ended) / 1000
        del self.pending[:count]

    def total(self) -> float:
        """Seconds so far; waits for the device."""
        self.drain(len(self.pending))
        return self.seconds
