"""Run `softsae sweep` over every architecture at three k, as a user would, and keep its table and picture.

    python -m benchmarks.sweep                                # collects the demo's activations first
    python -m benchmarks.sweep --activations runs/demo/activations
    python -m benchmarks.sweep --lr 5e-4 1e-3 2e-3            # the same search for all of them
    python -m benchmarks.sweep --variants topk msae --folder runs/a     # some, in a folder that is kept
    python -m benchmarks.sweep --run runs/a/sweep runs/b/sweep          # what finished sweeps left, as one

Sizes are those of `softsae demo` on this machine, unless given. A sweep that was interrupted goes on where
--folder names the same folder again. Several of different variants, run side by side on several GPUs or one
after the other, make one result. Writes benchmarks/results/sweep-DEVICE.json, one row for each autoencoder
and untrained control, and sweep-DEVICE.png, the frontier.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from benchmarks.environment import RESULTS, device_label, write
from softsae.architectures import ARCHITECTURES
from softsae.cli import main as softsae
from softsae.demo import ON_CPU, ON_GPU, Sizes
from softsae.report import plots
from softsae.runs import OPTIONS
from softsae.sweep_command import CONTROL

SIZES = ("n", "steps", "batch_size", "cross_entropy_tokens")  # that can be given here
# What sets L0, and its values; for relu and gated L0 is what the weights make of it.
DIALS = {"k": [16, 32, 64], "l1_weight": [0.05, 0.1, 0.2]}
MATRYOSHKA = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
NESTED = {"architecture": "batchtopk", "name": "matryoshka", "matryoshka": MATRYOSHKA}
VARIANTS = (*ARCHITECTURES, NESTED["name"])


def configuration(
    activations: Path,
    sizes: Sizes,
    device: str,
    lr: list[float],
    seed: int,
    variants: Sequence[str] = VARIANTS,
) -> dict:
    """The --config file: architectures, and BatchTopK with nested groups of latents beside them."""
    used = {NESTED["architecture"] if name == NESTED["name"] else name for name in variants}
    turned = {ARCHITECTURES[name][0].dial for name in used}
    # Defaults of these two are for longer training.
    special = {name: {"threshold_from": sizes.steps // 2} for name in ("batchtopk", "featurechoice")}
    return {
        "activations": str(activations),
        "architectures": [name for name in variants if name in ARCHITECTURES],
        "autoencoders": [NESTED] if NESTED["name"] in variants else [],
        **{dial: values for dial, values in DIALS.items() if dial in turned},
        "lr": lr or [sizes.lr],
        "cross_entropy_tokens": sizes.cross_entropy_tokens,
        "autoencoder": {"n": sizes.n, **{name: given for name, given in special.items() if name in used}},
        "train": {
            "steps": sizes.steps,
            "batch_size": sizes.batch_size,
            "device": device,
            "seed": seed,
            "checkpoint_every": 0,
            "log_every": 20,
        },
    }


def call(*arguments: str) -> None:
    if status := softsae(list(arguments)):
        raise SystemExit(status)


def run(args: argparse.Namespace) -> Path:
    """The folder of the sweep that the arguments ask for, once it is done."""
    folder = args.folder or Path(tempfile.mkdtemp())
    out = folder / "sweep"
    if (out / OPTIONS).is_file():
        call("sweep", "--resume", "--out", str(out))
        return out
    sizes = ON_CPU if args.device == "cpu" else ON_GPU
    given = {size: getattr(args, size) for size in SIZES if getattr(args, size) is not None}
    sizes = dataclasses.replace(sizes, **given)
    activations = args.activations or folder / "activations"
    if not activations.exists():
        call("collect", "--out", str(activations), "--tokens", str(sizes.tokens), "--device", args.device)
    found = configuration(activations, sizes, args.device, args.lr, args.seed, args.variants)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "sweep.yaml"
    config.write_text(yaml.safe_dump(found | {"together": args.together, "quick": args.quick}))
    call("sweep", "--config", str(config), "--out", str(out))
    return out


def merged(parts: Sequence[dict]) -> dict:
    """The results (sweep.json) of sweeps of different variants as those of one.

    Controls that several have are taken from the first. Rows are in the order of VARIANTS and of k, with the
    controls last.

    Raises ValueError for sweeps that were evaluated on different data or share an autoencoder.
    """
    first = parts[0]
    rows: dict[str, dict] = {}
    for part in parts:
        if evaluated_on(part) != evaluated_on(first):
            raise ValueError(f"sweeps on {evaluated_on(first)} and on {evaluated_on(part)} are not one sweep")
        for row in part["rows"]:
            if row["name"] in rows and "error" in row:  # an autoencoder, not a control
                raise ValueError(f"{row['name']} is in two of the sweeps")
            rows.setdefault(row["name"], row)
    place = {variant: i for i, variant in enumerate(VARIANTS)} | {CONTROL: len(VARIANTS) + 1}
    order = {name: (place.get(row["variant"], len(VARIANTS)), row["k"] or 0) for name, row in rows.items()}
    ordered = [rows[name] for name in sorted(rows, key=order.get)]
    found = {**first, "rows": ordered}
    if first["cross_entropy"]:
        found["cross_entropy"] = united([part["cross_entropy"] for part in parts])
    return found


def evaluated_on(results: dict) -> dict:
    """What a sweep's autoencoders were evaluated on."""
    ce = results["cross_entropy"] or {}
    return {"part": results["part"], "samples": results["samples"], "tokens": ce.get("tokens")}


def united(dictionaries: Sequence[dict]) -> dict:
    """All entries, of dictionaries in them likewise; the first's where several have one."""
    found: dict = {}
    for dictionary in dictionaries:
        for name, value in dictionary.items():
            if isinstance(value, dict):
                found[name] = united([found.get(name, {}), value])
            else:
                found.setdefault(name, value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--activations", type=Path, help="a folder that softsae collect made")
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, choices=VARIANTS, metavar="NAME", help="all by default"
    )
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[], help="learning rates; the demo's by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--together", type=int, help="autoencoders that are trained at a time; all by default"
    )
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int, help="the demo's by default")
    parser.add_argument("--quick", action="store_true", help="as of softsae sweep, to try the script out")
    parser.add_argument("--folder", type=Path, help="for activations and run folders; a temporary one if not")
    parser.add_argument(
        "--run", type=Path, nargs="+", help="folders of finished sweeps; by default one is run"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    args = parser.parse_args()
    runs = args.run or [run(args)]
    results = merged([json.loads((folder / "sweep.json").read_text()) for folder in runs])
    name = f"sweep-{device_label(args.device)}"
    about = {field: results[field] for field in ("part", "samples", "cross_entropy")}
    write(args.out / f"{name}.json", results["rows"], **about)
    plots.frontier(args.out / f"{name}.png", results["rows"])


if __name__ == "__main__":
    main()
