"""Run `softsae demo` as a user would, and keep its numbers and its picture.

    python -m benchmarks.demo                      # the demo's defaults for this machine
    python -m benchmarks.demo --run runs/demo      # only keep what a finished demo left there

Writes benchmarks/results/demo-DEVICE.json, whose one row is the demo's results.json, and
demo-DEVICE.png, its headline picture.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, device_label, write
from softsae.cli import main as softsae


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run", type=Path, help="the folder of a finished demo; without it one is run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    args = parser.parse_args()
    run = args.run
    if run is None:
        run = Path(tempfile.mkdtemp()) / "demo"
        if status := softsae(["demo", "--device", args.device, "--out", str(run)]):
            raise SystemExit(status)
    name = f"demo-{device_label(args.device)}"
    write(args.out / f"{name}.json", [json.loads((run / "results.json").read_text())])
    shutil.copyfile(run / "headline.png", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
