"""Several autoencoders trained on one stream of activations, and a table of what became of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from softsae import metrics, runs
from softsae.activations import as_source, widths
from softsae.autoencoder import SparseAutoencoder
from softsae.checks import integer, optional
from softsae.config import AutoencoderConfig, RunConfig, TrainConfig, resolve
from softsae.lockstep import SHARED_FIELDS, train_together
from softsae.trainer import Trainer

FAILURE = "failure.json"  # in the folder of a member whose loss was not finite


class NonFiniteLoss(ValueError):
    """The loss of a member is NaN or infinite; the message says at which step."""


@dataclass
class Trained:
    """What became of a member.

    config: resolved. sae: the autoencoder, None where it failed. steps: done. seconds: spent in its own
    steps (see softsae/timer.py), without reading, logging and evaluating; of all runs that were
    resumed. error: why it failed, else None.
    """

    config: RunConfig
    sae: SparseAutoencoder | None = None
    steps: int = 0
    seconds: float = 0.0
    error: str | None = None

    def row(self, name: str) -> dict:
        """The member in a table, apart from what an evaluation adds."""
        model, train = self.config.autoencoder, self.config.train
        dial = model.section.dial
        return {
            "name": name,
            "architecture": model.architecture,
            "k": model.k if dial == "k" else None,
            "l1_weight": model.section.l1_weight if dial == "l1_weight" else None,
            "n": model.n,
            "d": model.d,
            "lr": train.lr,
            "seed": train.seed,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "samples_per_second": self.steps * train.batch_size / self.seconds if self.seconds else None,
            "error": self.error,
            "config": dataclasses.asdict(self.config),
        }


class Sweep:
    """Trains several autoencoders on the same batches: each is what `Trainer` makes of it alone.

    Every batch is read, checked and moved to the device once. A member that raises in one of its
    steps, or whose loss is not finite when it is logged, is left out from there on, and the others go
    on; errors of the activations, of the configuration and of the initialisation end them all.

    Args:
        members: name -> RunConfig, or AutoencoderConfig followed by a TrainConfig for all. The training
            options that the stream depends on (steps, batch_size, seed, nonfinite, device) are equal.
        out: a folder; every member has a run folder of its name in it, as of `Trainer`. None keeps
            everything in memory.
        together: how many are trained at a time, each time reading the activations again; None is all.
        callbacks: called as callback(name, trainer, record) with every line of metrics. There,
            samples_per_second is the rate at which all of them get on.
        progress: show a progress bar.

    Attributes: members, name -> `Trained`, after `fit`.

    Raises ValueError for no members, names that no file can have and options that have to be equal.
    """

    def __init__(
        self,
        members: Mapping[str, RunConfig | AutoencoderConfig],
        train: TrainConfig | None = None,
        *,
        out: str | Path | None = None,
        together: int | None = None,
        callbacks: Iterable[Callable[[str, Trainer, dict], None]] = (),
        progress: bool = True,
    ):
        optional(integer, "together", together, 1)
        if not members:
            raise ValueError("members={}: a sweep needs an autoencoder")
        self.configs = {name: Trainer(config, train).config for name, config in members.items()}
        self.out = None if out is None else Path(out)
        self.together = together or len(members)
        self.callbacks = tuple(callbacks)
        self.progress = progress
        self.members: dict[str, Trained] = {}
        check_names(self.configs)
        check_stream(self.configs)

    def fit(self, source, held_out=None, target=None) -> dict[str, SparseAutoencoder]:
        """Train all to the last step; from their checkpoints where `out` holds any.

        Members whose checkpoints are of different steps wait for those that are behind. One whose loss
        was not finite is not tried again (its folder says so in failure.json), one that raised is.

        Args:
            source: as of `Trainer.fit`; with fewer `together` than members it is read several times.
            held_out, target: as of `Trainer.fit`.

        Returns the autoencoders that were trained, in eval mode, by name; `members` has the others.

        Raises ValueError where all of them failed, and what `Trainer.fit` does.
        """
        source = as_source(source, target)
        self.members = {
            name: Trained(resolve(config, *widths(source))) for name, config in self.configs.items()
        }
        names = [name for name in self.configs if not self.has_failed(name)]
        for first in range(0, len(names), self.together):
            self.fit_some(names[first : first + self.together], source, held_out)
        trained = {name: member.sae for name, member in self.members.items() if member.sae is not None}
        if not trained:
            said = "; ".join(f"{name}: {member.error}" for name, member in self.members.items())
            raise ValueError(f"every autoencoder of the sweep failed: {said}")
        return trained

    def fit_some(self, names: list[str], source, held_out):
        trainers = {name: self.trainer(name) for name in names}
        name_of = {id(trainer): name for name, trainer in trainers.items()}

        def failed(trainer: Trainer, error: Exception):
            self.keep_failure(name_of[id(trainer)], trainer, error)

        try:
            train_together(list(trainers.values()), source, held_out, self.progress, failed)
        except KeyboardInterrupt as interruption:
            if not str(interruption):  # before the first step
                raise
            raise KeyboardInterrupt(self.interrupted(trainers)) from None
        for name, trainer in trainers.items():
            member = self.members[name]
            if member.error is None:
                member.sae, member.steps, member.seconds = trainer.sae, trainer.step, trainer.timer.total()

    def trainer(self, name: str) -> Trainer:
        def tell(trainer: Trainer, record: dict):
            for callback in self.callbacks:
                callback(name, trainer, record)

        folder = None if self.out is None else self.out / name
        return Trainer(self.configs[name], out=folder, callbacks=[tell, refuse_nonfinite_loss])

    def keep_failure(self, name: str, trainer: Trainer, error: Exception):
        """Remember why a member is left out, and free what it holds on the device."""
        member = self.members[name]
        member.steps, member.seconds = trainer.step, trainer.timer.seconds
        member.error = f"step {trainer.step}: {type(error).__name__}: {error}".splitlines()[0]
        trainer.sae = trainer.optimizer = trainer.dead = trainer.one_step = trainer.run_step = None
        if self.out is not None and isinstance(error, NonFiniteLoss):
            kept = {"steps": member.steps, "seconds": member.seconds, "error": member.error}
            runs.write_json(self.out / name / FAILURE, kept)
        tqdm.write(f"{name} is left out: {member.error}")

    def has_failed(self, name: str) -> bool:
        """Whether an earlier run has found that the member's loss is not finite."""
        file = None if self.out is None else self.out / name / FAILURE
        if file is None or not file.is_file():
            return False
        kept = runs.read_json(file)
        self.members[name] = dataclasses.replace(self.members[name], **kept)
        return True

    def interrupted(self, trainers: dict[str, Trainer]) -> str:
        step = min(trainer.step for name, trainer in trainers.items() if self.members[name].error is None)
        where = f"interrupted after step {step} of {self.configs[next(iter(trainers))].train.steps}"
        if self.out is None:
            return f"{where}; nothing was saved, because the sweep has no output folder"
        return f"{where}; {self.out} holds it: run the same again with out={self.out} to go on"

    def evaluate(self, held_out: Iterable[Tensor], limit: int | None = None) -> list[dict]:
        """The table: a row for every member with its metrics on batches, at most `limit` of them.

        `held_out` is iterated once for each member. A row is that of `Trained.row` with what
        `figures` takes from `softsae.evaluate`, None where the member failed.
        """
        rows = []
        for name, member in self.members.items():
            found = None if member.sae is None else metrics.evaluate(member.sae, held_out, limit)
            rows.append({**member.row(name), **figures(found)})
        return rows


def figures(evaluation: dict | None) -> dict:
    """The columns of a table from `softsae.evaluate`."""
    if evaluation is None:
        names = ("explained_variance", "mean_squared_error", "l0_mean", "l0_sd", "dead_latents")
        return dict.fromkeys(names)
    return {
        "explained_variance": evaluation["explained_variance"],
        "mean_squared_error": evaluation["mean_squared_error"],
        "l0_mean": evaluation["l0"]["mean"],
        "l0_sd": evaluation["l0"]["sd"],
        "dead_latents": evaluation["dead_latents"],
    }


def refuse_nonfinite_loss(trainer: Trainer, record: dict):
    """A callback that raises once a logged loss is NaN or infinite."""
    if "loss" in record and not math.isfinite(record["loss"]):
        raise NonFiniteLoss(f"the loss is {record['loss']}")


def check_names(names: Iterable[str]):
    for name in names:
        if not name or name.startswith(".") or not all(c.isalnum() or c in "._+-" for c in name):
            raise ValueError(f"name={name!r} must be of letters, digits and . _ + -, since a folder gets it")


def check_stream(configs: Mapping[str, RunConfig]):
    """Raises ValueError for members that cannot be trained on the same batches."""
    (first, reference), *rest = configs.items()
    for name, config in rest:
        for field in SHARED_FIELDS:
            ours, theirs = getattr(config.train, field), getattr(reference.train, field)
            if ours != theirs:
                raise ValueError(
                    f"train.{field} is {ours!r} for {name} and {theirs!r} for {first}:"
                    " autoencoders on one stream share it"
                )
