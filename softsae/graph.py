"""A training step in a CUDA graph: recorded once, then replayed as a whole, without the host's work for it.

Batches and the numbers that change with the step are copied to where the recorded kernels read them. What
changes the kernels themselves (a hard phase, another path, room for more active latents, a longer list of
dead ones) has the step recorded anew, after a few steps as they are: these are steps of the training like
all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from softsae.step import Numbers, Plan, Result, Step

WARM_UP = 3  # steps as they are before one is recorded: kernels are loaded and compiled, memory is there


class Scalars:
    """Named float32 numbers on a device, each a 0-d view of one tensor."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names, self.pinned = names, device.type == "cuda"
        self.values = torch.zeros(len(names), device=device)
        self.views = dict(zip(names, self.values.unbind(), strict=True))

    def write(self, numbers: dict[str, float]):
        """The host does not wait: what is copied is not written again before it has been read."""
        staged = torch.tensor([numbers[name] for name in self.names], pin_memory=self.pinned)
        self.values.copy_(staged, non_blocking=True)


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None, *given: Tensor | None) -> Iterator[None]:
    """What is asked for inside is done on a stream, in its turn among what the current one does, from which
    the tensors given are; on the current one for None."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
    for tensor in given:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(stream)


class Recorder:
    """Runs steps; on a GPU it records and replays them.

    Args:
        step: what is run.
        device: of the autoencoder.
        stream: on which steps are run and recorded. None runs every step as it is, with its numbers on the
            device.
    """

    def __init__(self, step: Step, device: torch.device, stream: torch.cuda.Stream | None):
        self.step, self.device, self.stream = step, device, stream
        self.key: tuple | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, target: Tensor | None, numbers: Numbers, plan: Plan) -> Result:
        """As of `Step`; what it returns holds until the next call."""
        given = flattened(numbers)
        key = (plan.max_active, id(plan.dead.indices), *structure(numbers), *given)
        if key != self.key:
            self.forget()
            self.key, self.warm = key, 0
            self.plan = plan  # kept, so that no other list gets its id
            self.scalars = Scalars(tuple(given), self.device)
        self.scalars.write(given)
        if self.graph is not None and x.shape == self.x.shape:
            return self.replay(x, target)
        if self.stream is None or self.graph is not None or self.warm < WARM_UP:
            self.warm += 1
            with on_stream(self.stream, x, target):
                return self.step(x, target, self.on_device(numbers), plan)
        self.capture(x, target, self.on_device(numbers), plan)
        return self.replay(x, target)

    def on_device(self, numbers: Numbers) -> Numbers:
        """The numbers as 0-d tensors."""
        views = self.scalars.views
        phase = numbers.phase._replace(k_target=views["k_target"], alpha=views.get("alpha"))
        return Numbers(phase, views["lr"], {name: views[f"weight {name}"] for name in numbers.weights})

    def capture(self, x, target, numbers: Numbers, plan: Plan):
        self.x, self.target = x.clone(), None if target is None else target.clone()
        self.step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the graph's memory is its own: what the steps before had is not needed
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.result = self.step(self.x, self.target, numbers, plan)
        self.graph = graph

    def replay(self, x, target) -> Result:
        self.x.copy_(x)
        if target is not None:
            self.target.copy_(target)
        self.graph.replay()
        return self.result

    def forget(self):
        """Give up the recorded step and its memory, gradients included."""
        self.graph = self.x = self.target = self.result = None
        self.step.optimizer.zero_grad(set_to_none=True)


def flattened(numbers: Numbers) -> dict[str, float]:
    """The numbers by name."""
    phase = numbers.phase
    alpha = {} if phase.alpha is None else {"alpha": phase.alpha}
    weights = {f"weight {name}": weight for name, weight in numbers.weights.items()}
    return {"lr": numbers.lr, "k_target": phase.k_target, **alpha, **weights}


def structure(numbers: Numbers) -> tuple:
    """What of the phase changes the kernels."""
    phase = numbers.phase
    return phase.hard, phase.learns, phase.regularizer is None
