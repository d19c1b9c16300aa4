"""Run `softsae sweep` over every architecture at three k, as a user would, and keep its table and picture.

    python -m benchmarks.sweep                                # collects the demo's activations first
    python -m benchmarks.sweep --activations runs/demo/activations
    python -m benchmarks.sweep --lr 5e-4 1e-3 2e-3            # the same search for all of them
    python -m benchmarks.sweep --run runs/sweep               # only keep what a finished sweep left there

Sizes are those of `softsae demo` on this machine, unless given. Writes
benchmarks/results/sweep-DEVICE.json, one row for each autoencoder and untrained control, and
sweep-DEVICE.png, the frontier.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import torch
import yaml

from benchmarks.environment import RESULTS, device_label, write
from softsae.architectures import ARCHITECTURES
from softsae.cli import main as softsae
from softsae.demo import ON_CPU, ON_GPU, Sizes

SIZES = ("n", "steps", "batch_size", "cross_entropy_tokens")  # that can be given here
KS = [16, 32, 64]
L1_WEIGHTS = [0.05, 0.1, 0.2]  # in place of k: L0 is what they make of it
MATRYOSHKA = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]


def special(steps: int) -> dict[str, dict]:
    """Options of architectures whose defaults are for longer training."""
    return {name: {"threshold_from": steps // 2} for name in ("batchtopk", "featurechoice")}


def configuration(activations: Path, sizes: Sizes, device: str, lr: list[float], seed: int) -> dict:
    """The --config file: all architectures, and BatchTopK with nested groups of latents beside it."""
    return {
        "activations": str(activations),
        "architectures": list(ARCHITECTURES),
        "autoencoders": [{"architecture": "batchtopk", "name": "matryoshka", "matryoshka": MATRYOSHKA}],
        "k": KS,
        "l1_weight": L1_WEIGHTS,
        "lr": lr or [sizes.lr],
        "cross_entropy_tokens": sizes.cross_entropy_tokens,
        "autoencoder": {"n": sizes.n, **special(sizes.steps)},
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--activations", type=Path, help="a folder that softsae collect made")
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
    parser.add_argument("--run", type=Path, help="the folder of a finished sweep; without it one is run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    args = parser.parse_args()
    run = args.run
    if run is None:
        sizes = ON_CPU if args.device == "cpu" else ON_GPU
        given = {size: getattr(args, size) for size in SIZES if getattr(args, size) is not None}
        sizes = dataclasses.replace(sizes, **given)
        folder = Path(tempfile.mkdtemp())
        run, activations, config = folder / "sweep", args.activations, folder / "sweep.yaml"
        if activations is None:
            activations = folder / "activations"
            call("collect", "--out", str(activations), "--tokens", str(sizes.tokens), "--device", args.device)
        found = configuration(activations, sizes, args.device, args.lr, args.seed)
        config.write_text(yaml.safe_dump(found | {"together": args.together, "quick": args.quick}))
        call("sweep", "--config", str(config), "--out", str(run))
    results = json.loads((run / "sweep.json").read_text())
    name = f"sweep-{device_label(args.device)}"
    about = {field: results[field] for field in ("part", "samples", "cross_entropy")}
    write(args.out / f"{name}.json", results["rows"], **about)
    shutil.copyfile(run / "frontier.png", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
