"""softsae sweep: several autoencoders on one stream of activations, evaluated and compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from softsae import runs
from softsae.activations import widths
from softsae.activations.shards import ShardSource
from softsae.autoencoder import SparseAutoencoder
from softsae.commands import (
    BATCH,
    HeldOut,
    check_run,
    explained_interruption,
    measure_cross_entropy,
    model_of,
    paths_of,
    sources_of,
    training_of,
)
from softsae.config import AutoencoderConfig, RunConfig, resolve
from softsae.cross_entropy import CrossEntropy
from softsae.metrics import evaluate
from softsae.options import SweepOptions
from softsae.report.sweep import write_sweep
from softsae.report.tokens import untrained
from softsae.sweep import Sweep, figures
from softsae.trainer import pick_device
from softsae.variants import Member, members

AUTOENCODERS = "autoencoders"  # the folder of the members' run folders
CONTROL = "untrained"


def sweep(options: SweepOptions) -> None:
    """Trains what the options ask for, or what is left of it, and writes the comparison."""
    out = Path(options.out)
    train = training_of(options)
    planned = members(options, train)
    source, held = sources_of(options)
    for name, member in planned.items():
        if name.startswith(CONTROL) or name in ("clean", "zero"):
            raise ValueError(f"name={name!r} is taken by what the autoencoders are compared with")
        check_run(member.config, source, options.resume)
    device = pick_device(train.device)
    untrained_configs = controls(options, planned, source)
    configs = {name: member.config for name, member in planned.items()}
    trainers = Sweep(configs, out=out / AUTOENCODERS, together=options.together)
    runs.open_run(out, "sweep", options, options.resume)
    with explained_interruption("sweep", out):
        trained = trainers.fit(source, HeldOut(held) if held is not None and train.eval_every else None)
    # All held-out rows; of training activations, of which there may be no end, the first ones.
    rows = HeldOut(source, 64 * BATCH) if held is None else HeldOut(held, 2**62)
    control = {
        name: untrained(SparseAutoencoder(config).to(device), next(source.batches(4 * BATCH, train.seed)))
        for name, config in untrained_configs.items()
    }
    table = [
        {**row, "variant": planned[row["name"]].variant, "group": planned[row["name"]].group}
        for row in trainers.evaluate(rows)
    ]
    table += [control_row(name, sae, evaluate(sae, rows)) for name, sae in control.items()]
    options = dataclasses.replace(options, device=str(device), seed=train.seed)
    found = cross_entropy(options, held, trained | control)
    about = {
        **paths_of(options, held),
        "part": "training" if held is None else "held-out",
        "samples": sum(len(batch) for batch in rows),
        "cross_entropy": found and found.as_dict(),
    }
    summary = write_sweep(out, about, [with_cross_entropy(row, found) for row in with_best(table)])
    print(summary.read_text())


def controls(options: SweepOptions, planned: dict[str, Member], source) -> dict[str, AutoencoderConfig]:
    """An untrained TopK for every k of the sweep, with as many latents as the largest at that k."""
    models = [member.config.autoencoder for member in planned.values()]
    sizes: dict[float, int] = {}
    for model in models:
        if model.section.dial == "k":
            sizes[model.k] = max(model.n, sizes.get(model.k, 0))
    shared = options.autoencoder
    made = {
        f"{CONTROL}-k{k:g}": AutoencoderConfig(
            n=n, k=k, architecture="topk", normalization=shared.normalization
        )
        for k, n in sorted((sizes or {shared.k: shared.n}).items())
    }
    return {
        name: resolve(RunConfig(config, options.train), *widths(source)).autoencoder
        for name, config in made.items()
    }


def control_row(name: str, sae: SparseAutoencoder, evaluation: dict) -> dict:
    c = sae.config
    row = {"name": name, "architecture": CONTROL, "k": c.k, "n": c.n, "d": c.d, "variant": CONTROL}
    return {**row, "group": name, **figures(evaluation), "config": {"autoencoder": dataclasses.asdict(c)}}


def with_best(rows: list[dict]) -> list[dict]:
    """The rows, with `best`: whether no other learning rate explains more variance."""

    def explained(row: dict) -> float:
        value = row["explained_variance"]
        return -float("inf") if value is None or value != value else value

    best: dict[str, float] = {}
    for row in rows:
        best[row["group"]] = max(explained(row), best.get(row["group"], -float("inf")))
    return [
        {**row, "best": explained(row) > -float("inf") and explained(row) == best[row["group"]]}
        for row in rows
    ]


def cross_entropy(
    options: SweepOptions, held, autoencoders: dict[str, SparseAutoencoder]
) -> CrossEntropy | None:
    """With every autoencoder, where the held-out activations know their language model."""
    tokens = options.cross_entropy_tokens
    tokens = min(tokens, 500) if options.quick else tokens
    if not tokens:
        return None
    if not isinstance(held, ShardSource):
        reason = "no held-out activations that say which language model they are from"
        print(f"no cross-entropy: {reason if options.target is None else 'they are transcoders'}")
        return None
    lm = model_of(held, options)
    sequences = held.sequences.draw(tokens, options.seed)
    return measure_cross_entropy(lm, held, sequences, autoencoders)


def with_cross_entropy(row: dict, found: CrossEntropy | None) -> dict:
    """The row with what is recovered, excluded positions untouched and replaced; None if not measured."""
    name = row["name"]
    measured = found is not None and name in found.untouched
    return {
        **row,
        "cross_entropy": found.untouched[name] if measured else None,
        "recovered": found.recovered(name) if measured else None,
        "recovered_all_replaced": found.recovered(name, "replaced") if measured else None,
    }
