"""Our training steps as benchmarks/step.py times them: of softsae's Trainer, on batches on the device."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.sparse_bars import BOTTLENECK, TOPK, WIDE
from softsae import AutoencoderConfig, SoftSAEConfig, TrainConfig, Trainer
from softsae.architectures import EstimatorConfig
from softsae.memory import memory_of

ALPHA = 1e-4
STEPS = 100_000  # of the training that the timed steps are the start of: no schedule ends while they run
ESTIMATORS = {WIDE: "wide", BOTTLENECK: "bottleneck"}
TRAINERS = (WIDE, BOTTLENECK, TOPK)
PATHS = ("sparse", "dense", "auto")


class Width:
    """A source of activations of which only the width is asked for."""

    def __init__(self, d: int):
        self.d = d


def hidden_units(trainer: str, n: int) -> int:
    """Of the estimator of k."""
    if trainer not in ESTIMATORS:
        return 0
    return n if trainer == WIDE else EstimatorConfig("bottleneck").width


def training(
    shape: tuple[int, int, int, int],
    trainer: str,
    path: str,
    precision: str,
    device: str,
    batches: list[Tensor],
    wrap: Callable[[Trainer], None] = lambda run: None,
    **options,
) -> Trainer:
    """A trainer before its first step at (B, d, n, k), with options of TrainConfig; `wrap` is called before
    anything is recorded."""
    rows, d, n, k = shape
    if trainer == TOPK:
        model = AutoencoderConfig(n=n, k=k, architecture="topk")
    else:
        section = SoftSAEConfig(alpha=ALPHA, estimator=EstimatorConfig(ESTIMATORS[trainer]))
        model = AutoencoderConfig(n=n, k=k, softsae=section)
    # A step costs the same whatever the learning rate; with this one the budgets stay what they are.
    given = dict(steps=STEPS, batch_size=rows, lr=1e-6, dtype=precision, path=path, device=device)
    train = TrainConfig(**given, **options)
    run = Trainer(model, train, progress=False)
    run.start(Width(d))
    wrap(run)
    run.initialize(batches[0], None)
    return run


def do_steps(run: Trainer, batches: list[Tensor], count: int) -> None:
    for _ in range(count):
        run.train_step(batches[run.step % len(batches)], False)
        run.step += 1


def memory(run: Trainer, held: int) -> dict[str, int]:
    """The peak since it was reset without what was held before, and what is not parameters, gradients and the
    optimizer's state; copies of the weights in bfloat16 count as such."""
    parts = memory_of(run.sae, run.optimizer, run.device)
    state = parts["parameters"] + parts["gradients"] + parts["optimizer"]
    peak = parts["peak"] - held
    return {
        "peak_bytes": peak,
        "state_bytes": state,
        "beyond_bytes": peak - state,
        "copies_bytes": parts["copies"],
    }
