"""Run `softsae demo` with each k estimator and several seeds, and keep what its autoencoders reach.

    python -m benchmarks.estimators                # the published estimator and the demo's, two seeds
    python -m benchmarks.estimators --seeds 1 2 3 --out results

Writes benchmarks/results/estimators-DEVICE.json, a row for each autoencoder of each demo.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, device_label, write
from softsae.cli import main as softsae


def rows_of(results: dict, seed: int) -> list[dict]:
    """A row for each autoencoder in a demo's results.json."""
    ce = results["cross_entropy"]
    return [
        {
            "estimator": results["estimator"],
            "seed": seed,
            "autoencoder": name,
            "explained_variance": round(found["explained_variance"], 4),
            "l0_mean": round(found["l0"]["mean"], 2),
            "dead_latents": found["dead_latents"],
            "cross_entropy": round(ce["untouched"][name], 4),
            "recovered": round(ce["recovered"]["untouched"][name], 4),
            "cross_entropy_all_replaced": round(ce["replaced"][name], 4),
            "recovered_all_replaced": round(ce["recovered"]["replaced"][name], 4),
            "demo_seconds": round(sum(results["seconds"].values()), 1),
        }
        for name, found in results["evaluations"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--estimators", nargs="+", default=["wide", "bottleneck"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="as of softsae demo, to try the script out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the file")
    args = parser.parse_args()
    folder, rows = Path(tempfile.mkdtemp()), []
    for estimator in args.estimators:
        for seed in args.seeds:
            out = folder / f"{estimator}-{seed}"
            options = ["--estimator", estimator, "--seed", str(seed), "--device", args.device]
            if status := softsae(["demo", "--out", str(out), *options, *["--quick"] * args.quick]):
                raise SystemExit(status)
            rows += rows_of(json.loads((out / "results.json").read_text()), seed)
    write(args.out / f"estimators-{device_label(args.device)}.json", rows)


if __name__ == "__main__":
    main()
