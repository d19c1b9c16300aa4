"""Training: the steps, the metrics, the checkpoints, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from softsae import checkpoint, metrics
from softsae.activations import as_source, widths
from softsae.autoencoder import SparseAutoencoder
from softsae.config import (
    AutoencoderConfig,
    RunConfig,
    TrainConfig,
    difference,
    own_options,
    resolve,
    square_norm,
)
from softsae.dead import DeadLatents
from softsae.graph import Recorder, on_stream
from softsae.keys import build
from softsae.lockstep import NonFiniteActivations as NonFiniteActivations
from softsae.lockstep import train_together
from softsae.memory import memory_of
from softsae.path import PathChoice
from softsae.runs import write_json
from softsae.schedules import Schedule
from softsae.step import Numbers, Plan, Step
from softsae.timer import StepTimer
from softtopk.optim import Adam

FORMAT = "softsae checkpoint 3"
# What may change when resuming.
FREE_FIELDS = (
    "device", "checkpoint_every", "log_every", "eval_every", "path", "sparse_below", "rows_at_a_time",
    "keep_copies", "cuda_graph",
)  # fmt: skip


class Trainer:
    """Trains a sparse autoencoder on a source of activations.

    Args:
        config: a RunConfig, or an AutoencoderConfig followed by a TrainConfig.
        out: the run's folder: config.json, metrics.jsonl, checkpoint.safetensors while it runs, and
            at the end sae/ (`softsae.load`). None keeps everything in memory.
        callbacks: called as callback(trainer, record) with every line of metrics.
        progress: show a progress bar.

    Attributes: sae, the autoencoder; step, the number of steps done; config, resolved at `fit`; timer,
    whose `total()` is the seconds that the steps took.
    """

    def __init__(
        self,
        config: RunConfig | AutoencoderConfig,
        train: TrainConfig | None = None,
        *,
        out: str | Path | None = None,
        callbacks: Iterable[Callable[[Trainer, dict], None]] = (),
        progress: bool = True,
    ):
        if isinstance(config, AutoencoderConfig):
            config = RunConfig(config, train or TrainConfig())
        elif train is not None:
            raise ValueError("train is part of a RunConfig already: give one of them")
        self.config = config
        self.out = None if out is None else Path(out)
        self.callbacks = tuple(callbacks)
        self.progress = progress
        self.step = 0
        self.consumed = 0  # batches of the source, where each starts being a matter of its own
        self.sae: SparseAutoencoder | None = None

    def fit(self, source, held_out=None, target=None) -> SparseAutoencoder:
        """Train to the last step; where `out` holds a checkpoint of this configuration, from there.

        Args:
            source: a tensor (samples, d), an iterable of tensors, an .npy file, a folder of shards,
                or a source (softsae/activations).
            held_out: tensors or a re-iterable of batches (B, d) to evaluate on, as eval_every says;
                with a target, a re-iterable of pairs (x, target).
            target: what to make of each sample instead of itself: a tensor (samples, d_out), an .npy
                file or a folder of shards with the same rows in the same order. That is a transcoder.
                A source that yields pairs, such as an iterable of (x, target), needs none here.

        Returns the autoencoder, in eval mode.

        Raises:
            ValueError: contradicting configuration, a checkpoint of another one (names the field),
                a source that ends early, a target with another number of rows.
            NonFiniteActivations: NaN or infinity in the activations, with nonfinite="refuse".
            KeyboardInterrupt: after Ctrl-C, once the step is done and a checkpoint is written.
        """
        train_together([self], as_source(source, target), held_out, self.progress)
        return self.sae

    def start(self, source, held_out=None):
        """Everything as it is before the first step on a source, or as the checkpoint in `out` has it."""
        self.step = self.consumed = 0
        self.config = resolve(self.config, *widths(source))
        self.held_out = [held_out] if isinstance(held_out, Tensor) else held_out
        train = self.config.train
        self.device = pick_device(train.device)
        self.timer = StepTimer(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.schedule = Schedule(self.config)
        self.sae = SparseAutoencoder(self.config.autoencoder, seed=train.seed).to(self.device).train()
        most = train.batch_size * (2 if train.count_logged_twice else 1)  # samples counted in a step
        self.dead = DeadLatents(self.config.autoencoder.n, train.dead_after, most).to(self.device)
        self.optimizer = self.make_optimizer()
        self.path = PathChoice(self.config, self.sae.selector, self.schedule.phase(0), self.device)
        self.one_step = Step(
            self.sae, self.config, self.optimizer, self.dead, self.path.support, self.path.measures_dense
        )
        recorded = train.cuda_graph and self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if recorded else None
        self.run_step = Recorder(self.one_step, self.device, self.stream) if recorded else self.one_step
        self.resumed = self.resume()

    def initialize(self, batch: Tensor, source):
        """Normalisation, b_dec and the rule from the first batches of the source as one."""
        x, target = self.sae.split(batch)
        # Where the steps will run: for every stream cuBLAS keeps a workspace, of 32 MiB on an H200.
        with on_stream(self.stream, x, target):
            self.sae.initialize(x, target)
        prepared = self.sae.selector.prepare(self.sae, x, source, self.config.train.seed)
        if prepared is not None:
            self.record({"event": "prepared", "step": 0, **prepared})
        if self.out is not None:
            write_json(self.out / "config.json", self.config)

    def finish(self):
        """After the last step."""
        self.sae.eval()
        if self.out is not None:
            self.sae.save(self.out / "sae")

    def make_optimizer(self) -> Adam:
        """Adam over two groups: the autoencoder's parameters and the estimator's."""
        train = self.config.train
        estimator = self.sae.selector.estimator_parameters()
        known = {id(p) for p in estimator}
        own = [p for p in self.sae.parameters() if id(p) not in known]
        groups = [{"params": own, "multiplier": 1.0}]
        if estimator:
            groups.append({"params": estimator, "multiplier": train.estimator_lr_multiplier})
        betas = train.adam_beta1, train.adam_beta2
        return Adam(groups, lr=train.lr, betas=betas, normalize_rows=[self.sae.W_dec])

    def advance(self, batch: Tensor, consumed: int) -> dict:
        """One step, and the metrics, evaluation and checkpoint that are due after it; what was logged.

        `consumed` is the number of batches of the source up to the end of this one.
        """
        train = self.config.train
        logged = (self.step + 1) % train.log_every == 0 or self.step + 1 == train.steps
        with self.timer:
            record = self.train_step(batch, logged)
        self.step += 1
        self.consumed = consumed
        if logged:
            now = time.perf_counter()
            rate = (self.step - self.clock[1]) * train.batch_size / (now - self.clock[0])
            record = {name: scalar(value) for name, value in record.items()}
            record["samples_per_second"] = round(rate, 1)
            if self.step == train.steps and self.device.type == "cuda":
                record["memory"] = memory_of(self.sae, self.optimizer, self.device)
            self.record(record)
            self.clock = time.perf_counter(), self.step
        last = self.step == train.steps
        if self.held_out is not None and (last or due(self.step, train.eval_every)):
            held_out = metrics.evaluate(self.sae, self.held_out)
            self.record({"event": "eval", "step": self.step, **held_out})
        if self.out is not None and (last or due(self.step, train.checkpoint_every)):
            self.save_checkpoint()
        return record

    def train_step(self, batch: Tensor, logged: bool) -> dict:
        """One step on a batch of the source; what it measured, as scalars on the device, when logged."""
        train, step = self.config.train, self.step
        x, target = self.sae.split(batch)
        phase, lr = self.schedule.phase(step), self.schedule.lr(step)
        of_x = square_norm(self.config.autoencoder)
        weights = {"auxk": train.auxk_weight * of_x, **train.regularizer.weights(of_x)}
        weights |= self.sae.selector.loss_weights(train, of_x, step)
        places = self.path.places(step, phase)
        if places is not None:
            self.one_step.prepare_sparse()
        plan = Plan(places, self.dead.refresh(step) if train.auxk_weight else self.dead.list)
        result = self.run_step(x, target, Numbers(phase, lr, weights), plan)
        if not logged:
            return {}
        if train.count_logged_twice:
            self.dead.update(result.fired, len(x))
        return {
            "step": step + 1,
            **self.one_step.report(result, x if target is None else target),
            "k_target": phase.k_target,
            "alpha": phase.alpha,
            "hard": phase.hard,
            "lr": lr,
            **self.path.report(places, phase),
        }

    def record(self, line: dict):
        """Append a line of metrics and tell the callbacks."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        for callback in self.callbacks:
            callback(self, line)

    @property
    def checkpoint_file(self) -> Path:
        return self.out / "checkpoint.safetensors"

    def save_checkpoint(self):
        """Everything that the following steps depend on, in one file."""
        parameters = dict(self.sae.named_parameters())
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        tensors |= {f"dead.{name}": value for name, value in self.dead.state_dict().items()}
        for name, parameter in parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        tensors |= checkpoint.rng_state()
        header = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "consumed": self.consumed,
            "seconds": self.timer.total(),
            "dead": self.dead.state(),
            "path": self.path.state(),
        }
        checkpoint.write(self.checkpoint_file, tensors, header)

    def resume(self) -> bool:
        """Go back to the checkpoint in `out`, if there is one."""
        if self.out is None or not self.checkpoint_file.exists():
            return False
        file = self.checkpoint_file
        tensors, header = checkpoint.read(file, FORMAT)
        then = checkpoint.parse(file, lambda: run_config(header["config"]))
        if found := difference(comparable(then), comparable(self.config)):
            raise ValueError(f"{file} is from another configuration; they differ in {found}")
        checkpoint.fill(file, self.sae, part(tensors, "sae."))
        checkpoint.fill(file, self.dead, part(tensors, "dead."))
        for name, parameter in self.sae.named_parameters():
            state = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in state.values()):
                self.optimizer.state[parameter] = {
                    key: value.to(self.device, torch.float32) for key, value in state.items()
                }
        self.dead.restore(header.get("dead"))
        self.path.restore(header.get("path"))
        checkpoint.restore_rng(tensors)
        self.step, self.consumed = header["step"], header["consumed"]
        self.timer = StepTimer(self.device, header["seconds"])
        self.forget_metrics_after(self.step)
        return True

    def forget_metrics_after(self, step: int):
        """Drop the lines of steps that will be done again."""
        file = self.out / "metrics.jsonl"
        if file.exists():
            lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
            file.write_text("".join(line + "\n" for line in lines))

    def leave_checkpoint(self) -> str:
        """Save on interruption; what to tell the user."""
        where = f"interrupted after step {self.step} of {self.config.train.steps}"
        if self.out is None:
            return f"{where}; nothing was saved, because the trainer has no output folder"
        self.save_checkpoint()
        return f"{where}; {self.checkpoint_file} holds it: run the same again with out={self.out} to go on"


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is cuda where there is one. ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def run_config(values: dict) -> RunConfig:
    """The configuration in the header of a checkpoint."""
    return build(RunConfig, {**values, "autoencoder": own_options(values["autoencoder"])}, "config")


def comparable(config: RunConfig) -> dict:
    values = dataclasses.asdict(config)
    train = {name: value for name, value in values["train"].items() if name not in FREE_FIELDS}
    return {**values, "train": train}


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def scalar(value):
    return value.item() if isinstance(value, Tensor) else value
