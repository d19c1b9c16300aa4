"""The seconds of a trainer's own steps."""

from __future__ import annotations

import pytest
import torch

from softsae.timer import StepTimer


class Event:
    """A CUDA event on a device that needs a millisecond from each to the next."""

    marks = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        Event.marks += 1
        self.at, self.waited_for = Event.marks, False

    def synchronize(self):
        self.waited_for = True

    def elapsed_time(self, later):
        assert later.waited_for
        return later.at - self.at


def test_time_on_a_gpu_is_read_from_events_when_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    timer = StepTimer(torch.device("cuda"), 2.0)
    for _ in range(3):
        with timer:
            pass
    assert timer.seconds == 2.0 and not any(end.waited_for for _, end in timer.pending)
    assert timer.total() == pytest.approx(2.003) == timer.total()
    for _ in range(1000):
        with timer:
            pass
    assert len(timer.pending) <= StepTimer.MOST_PENDING and timer.seconds > 2.5
    assert timer.total() == pytest.approx(3.003)


@pytest.mark.gpu
def test_time_on_a_gpu():
    timer = StepTimer(torch.device("cuda"))
    for _ in range(300):
        with timer:
            torch.cuda._sleep(1_000_000)  # cycles: half a millisecond
    assert 0.05 < timer.total() < 10
