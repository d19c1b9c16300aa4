"""What an implementation of soft top-k can do: every feature is tried, not looked up.

    python -m benchmarks.features "softtopk cpu"      # one JSON line for each feature

An outcome is "yes", a figure, "none: ..." where the feature is not offered, "wrong: ..." where the
result is not right, or "raises ..." with the first line of what was raised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch

from benchmarks.environment import ROOT
from benchmarks.implementations import Absent, Implementation, load
from benchmarks.probes import FEATURES, Wrong, status_bytes


def outcome(probe: Callable, implementation: Implementation, device: str) -> str:
    """ "yes", a figure, or what went wrong, in one line without the paths of this machine."""
    try:
        return probe(implementation, device) or "yes"
    except Absent as error:
        return f"none: {error}"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        return f"raises {one_line(error)}"


def one_line(error: Exception) -> str:
    """The type and the first line of an error, without the folders of this machine."""
    lines = str(error).strip().splitlines() or [""]
    first = re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", lines[0])
    return f"{type(error).__name__}: {first[:160]}"


def in_a_process(name: str, device: str, seconds: float = 240) -> dict[str, str]:
    """The outcome of every feature, tried in processes of its own: one that dies is an outcome too."""
    found: dict[str, str] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(FEATURES):
        command = [sys.executable, "-m", "benchmarks.features", name]
        command += ["--device", device, "--skip", str(len(found))]
        try:
            child = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},  # what is freed leaves the process
                capture_output=True,
                text=True,
                timeout=deadline - time.monotonic(),
            )
            printed, end = child.stdout, f"ended with {child.returncode}"
        except subprocess.TimeoutExpired as expired:
            printed = (expired.stdout or b"").decode()
            end = f"not done after {seconds:.0f} s"
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"feature"')]
        found |= {line["feature"]: line["outcome"] for line in lines}
        if len(found) < len(FEATURES):
            found[list(FEATURES)[len(found)]] = f"raises: {end}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="an implementation, as `python -m benchmarks.peers --list` names them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip", type=int, default=0, help="features to leave out at the start")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.device == "cpu":  # a peer that needs n^2 memory is to fail, not to stop the machine
        with contextlib.suppress(Absent):  # a system where it cannot be measured
            limit = status_bytes("VmSize") + int(os.environ.get("SOFTTOPK_FEATURES_BYTES", 8 << 30))
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    implementation = load(args.name, args.device)
    for feature, probe in list(FEATURES.items())[args.skip :]:
        line = {"feature": feature, "outcome": outcome(probe, implementation, args.device)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
