"""Where the time of one of our steps goes: the kernels of a replayed step, by stage.

A function that is a stage is made to launch a marker, a kernel that does nothing, before and after its own.
All kernels of a step are in one stream, so that what lies between two markers in the profiler's timeline
belongs to what they enclose, also where a CUDA graph replays it without the host. What a stage contains of
another one is the other's.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch

MARKER = "spin_kernel"  # of torch.cuda._sleep
STAGES = (
    *("encoder product", "estimator", "selection", "decode", "loss", "transposition", "dW_dec + dvalues"),
    *("gate", "dW_enc", "centre", "dense backward", "estimator backward", "clip", "Adam", "other"),
)
DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


class Mark(NamedTuple):
    """What a marker says: "enter" a stage, "leave" it, or "then": what is not in a stage is of this one."""

    what: str
    stage: str


class Kernel(NamedTuple):
    name: str
    start: float  # microseconds
    duration: float


class Marker:
    """Marks the stages of the steps that are made while it is active; `marks` are those of the last one."""

    def __init__(self, launch: Callable[[], object]):
        self.launch, self.marks = launch, []

    def mark(self, what: str, stage: str) -> None:
        self.launch()
        self.marks.append(Mark(what, stage))

    def stage(self, function: Callable, stage: str, then: str | None = None) -> Callable:
        """The function as a stage; after it what is in no stage belongs to `then`."""

        @wraps(function)
        def marked(*arguments, **options):
            self.mark("enter", stage)
            try:
                return function(*arguments, **options)
            finally:
                self.mark("leave", stage)
                if then is not None:
                    self.mark("then", then)

        return marked

    def step(self, function: Callable) -> Callable:
        """A whole step, with which marks begin anew."""

        @wraps(function)
        def marked(*arguments, **options):
            self.marks.clear()
            self.mark("then", "other")
            return function(*arguments, **options)

        return marked


def by_stage(kernels: list[Kernel], marks: list[Mark], steps: int) -> dict[str, dict[str, list[float]]]:
    """Durations by stage and kernel name of `steps` steps, whose marks are `marks` each.

    What is in no stage is "other" until a mark says what it is then. ValueError where there are not as many
    markers as that.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    found = sum(MARKER in kernel.name for kernel in ordered)
    if found != steps * len(marks):
        raise ValueError(f"{found} markers in {steps} steps of {len(marks)}")
    stages: dict[str, dict[str, list[float]]] = {}
    inside: list[str] = []
    outside, next_mark = "other", 0
    for kernel in ordered:
        if MARKER in kernel.name:
            what, stage = marks[next_mark % len(marks)]
            next_mark += 1
            if what == "enter":
                inside.append(stage)
            elif what == "leave":
                inside.pop()
            else:
                outside = stage
            continue
        stage = inside[-1] if inside else outside
        stages.setdefault(stage, {}).setdefault(kernel.name, []).append(kernel.duration)
    return stages


def summary(stages: dict[str, dict[str, list[float]]], steps: int) -> tuple[dict[str, float], list[dict]]:
    """Milliseconds of a step by stage, in order, and its kernels: stage, name, launches, milliseconds."""
    totals = {
        stage: round(sum(sum(times) for times in stages[stage].values()) / steps / 1e3, 5)
        for stage in STAGES
        if stage in stages
    }
    kernels = [
        {
            "stage": stage,
            "name": name[:100],
            "launches": round(len(times) / steps, 2),
            "ms": round(sum(times) / steps / 1e3, 5),
        }
        for stage, by_name in stages.items()
        for name, times in by_name.items()
    ]
    return totals, sorted(kernels, key=lambda kernel: -kernel["ms"])


def device_events(trace: dict) -> list[Kernel]:
    """Kernels, copies and fills of a Chrome trace of torch.profiler."""
    return [
        Kernel(event["name"], event["ts"], event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in DEVICE_EVENTS
    ]


def profiled(run_steps: Callable[[], object]) -> list[Kernel]:
    """What the device does while the steps run."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_steps()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return device_events(json.loads(path.read_text()))


@contextlib.contextmanager
def staged(marker: Marker, device: str) -> Iterator[None]:
    """softsae's and softtopk's functions, those of a device's kernels, as stages."""
    from softsae import autoencoder, losses, parts, selectors, step
    from softsae.k_estimator import KEstimator
    from softsae.sparse import CenterGradient
    from softtopk import dispatch, optim, projection, sparse_autograd

    kernels = dispatch.sparse_kernels(None, torch.device(device))
    sae = autoencoder.SparseAutoencoder
    softsae, topk = selectors.of("softsae"), selectors.of("topk")
    # (owner, name, stage, what follows)
    points: list[tuple[Any, str, str, str | None]] = [
        (sparse_autograd.Encode, "forward", "encoder product", None),
        (sae, "encoder", "encoder product", None),
        (KEstimator, "forward", "estimator", None),
        (projection.ReluProjection, "backward", "estimator backward", None),
        (kernels, "code_forward", "selection", None),
        (softsae, "forward", "selection", None),
        (topk, "forward", "selection", None),
        (sparse_autograd.Decode, "forward", "decode", "loss"),
        (sae, "decoder", "decode", "dense backward"),
        (parts.Encoded, "forward", "encoder product", None),
        (parts.Encoded, "backward", "dense backward", "other"),
        (parts.Decoded, "forward", "decode", "dense backward"),
        (losses, "reconstruction", "loss", None),
        (sparse_autograd.Decode, "backward", "dW_dec + dvalues", "other"),
        (kernels, "transpose", "transposition", None),
        (kernels, "code_backward", "gate", None),
        (sparse_autograd.Encode, "backward", "dW_enc", None),
        (CenterGradient, "backward", "centre", None),
        (step.Step, "clip", "clip", "other"),
        (optim.Adam, "step", "Adam", None),
    ]
    with contextlib.ExitStack() as undo:
        for owner, name, stage, then in points:
            undo.enter_context(replaced(owner, name, lambda f, s=stage, t=then: marker.stage(f, s, t)))
        undo.enter_context(replaced(step.Step, "__call__", marker.step))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, change: Callable[[Callable], Callable]) -> Iterator[None]:
    """owner.name as what `change` makes of it."""
    own = vars(owner) if hasattr(owner, "__dict__") else {}
    before = own.get(name)
    function = change(getattr(owner, name))
    setattr(owner, name, staticmethod(function) if isinstance(before, staticmethod) else function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
