"""The loop of training: several trainers step on the same batches, each read, checked and moved once.

A `Trainer` alone is the case of one. Trainers that were resumed at different steps (a crash can fall
between two checkpoints) wait until the stream has reached theirs.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from softsae.trainer import Trainer

INITIAL_SAMPLES = 8192  # that normalisation and geometric median are taken from, in whole batches
SHARED_FIELDS = ("steps", "batch_size", "seed", "nonfinite", "device")  # of TrainConfig: what a stream needs


class NonFiniteActivations(ValueError):
    """Activations hold NaN or infinity; the message says where."""


def train_together(
    trainers: Sequence[Trainer],
    source,
    held_out=None,
    progress: bool = True,
    failed: Callable[[Trainer, Exception], None] | None = None,
) -> None:
    """Train all of them to the last step, from their checkpoints where they have any.

    Args:
        trainers: with equal SHARED_FIELDS.
        source: see softsae/activations.
        held_out: as of `Trainer.fit`.
        failed: called when a trainer's step raises; the others go on without it. None lets it raise.
            What is raised before the first step, or by the source, always ends them all.

    Raises KeyboardInterrupt after Ctrl-C, once all have done the step and written a checkpoint; and
    what `Trainer.fit` does.
    """
    for trainer in trainers:
        trainer.start(source, held_out)
    running = [trainer for trainer in trainers if trainer.step < trainer.config.train.steps]
    done = [trainer for trainer in trainers if trainer not in running]
    batches = initialized(running, source) if running else ()
    try:
        with Interruption() as interruption:
            loop(running, batches, interruption, progress, failed)
    except KeyboardInterrupt:
        left = [trainer.leave_checkpoint() for trainer in running]
        raise KeyboardInterrupt(*left[:1]) from None
    for trainer in (*done, *running):
        trainer.finish()


def initialized(running: Sequence[Trainer], source) -> Iterable[tuple[Tensor, int]]:
    """`read`, the first batches having initialized the trainers that are new."""
    train = running[0].config.train
    batches = read(running, source)
    new = [trainer for trainer in running if not trainer.resumed]
    if not new:
        return batches
    first = list(islice(batches, min(math.ceil(INITIAL_SAMPLES / train.batch_size), train.steps)))
    if not first:
        raise ValueError("the source yields no batch")
    samples = torch.cat([batch for batch, _ in first])
    for trainer in new:
        trainer.initialize(samples, source)
    return chain(first, batches)  # they are trained on as well


def read(running: Sequence[Trainer], source) -> Iterator[tuple[Tensor, int]]:
    """The source's batches from where the last of the trainers is, checked, on the device.

    Each with the number of batches of the source up to its end.
    """
    train, device = running[0].config.train, running[0].device
    consumed = min(trainer.consumed for trainer in running)
    for batch in source.batches(train.batch_size, train.seed, consumed):
        batch = finite(batch, consumed, running, source)
        consumed += 1
        if len(batch):
            yield batch.to(device, torch.float32, non_blocking=True), consumed


def finite(batch: Tensor, number: int, running: Sequence[Trainer], source) -> Tensor:
    """The batch without the rows that hold NaN or infinity, if they may be skipped."""
    good = batch.isfinite().all(1)
    if good.all():
        return batch
    train = running[0].config.train
    rows = (~good).nonzero().squeeze(1).tolist()
    listed = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    where = f"activations hold NaN or infinity in batch {number}, rows {listed}"
    if hasattr(source, "locate"):  # stored activations know where on the disk that is
        where += f"; the first is {source.locate(len(batch), train.seed, number, rows[0])}"
    if train.nonfinite == "refuse":
        raise NonFiniteActivations(f"{where}; nonfinite='skip' leaves such samples out")
    for trainer in running:
        if trainer.consumed <= number:  # else it has reported that before it was interrupted
            trainer.record({"event": "nonfinite", "step": trainer.step, "batch": number, "rows": rows})
    tqdm.write(f"skipped: {where}")
    return batch[good]


def loop(
    running: list[Trainer],
    batches: Iterable[tuple[Tensor, int]],
    interruption: Interruption,
    progress: bool,
    failed: Callable[[Trainer, Exception], None] | None,
):
    """Every batch to every trainer; one that failed is taken out of `running`."""
    if not running:
        return
    steps, step = running[0].config.train.steps, min(trainer.step for trainer in running)
    for trainer in running:
        trainer.clock = time.perf_counter(), trainer.step
    with tqdm(total=steps, initial=step, disable=None if progress else True, unit="step") as bar:
        for batch, consumed in batches:
            logged = []
            for trainer in [trainer for trainer in running if trainer.consumed < consumed]:
                try:
                    record = trainer.advance(batch, consumed)
                except Exception as error:
                    if failed is None:
                        raise
                    running.remove(trainer)
                    failed(trainer, error)
                else:
                    logged += [record] if record else []
            step += 1
            bar.update()
            if logged:
                bar.set_postfix(ev=span(logged, "explained_variance", 3), l0=span(logged, "l0", 1))
            if step == steps or not running:
                return
            interruption.raise_if_asked()
    raise ValueError(f"the source ended after step {step} of {steps}")


def span(records: Sequence[dict], name: str, digits: int) -> str:
    """The least and the largest value, or the only one."""
    least, largest = (f"{of(r[name] for r in records):.{digits}f}" for of in (min, max))
    return least if len(records) == 1 else f"{least}…{largest}"


class Interruption:
    """Within it, Ctrl-C waits for the end of the step; a second Ctrl-C does not."""

    def __enter__(self) -> Interruption:
        self.asked = False
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGINT, self.previous)

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)

    def raise_if_asked(self):
        if self.asked:
            raise KeyboardInterrupt
