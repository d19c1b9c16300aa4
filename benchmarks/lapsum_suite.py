"""LapSum's own public tests, run against our operator.

    python -m benchmarks.lapsum_suite PATH       # a checkout of https://github.com/gmum/LapSum

PATH is a checkout, a folder of tests or one file; without it, what SOFTTOPK_PEER_LAPSUM names. The
package that the tests import is replaced by two functions of its signatures that call ours. pytest
runs every test_*.py; a file in which it finds no test is a script that prints a mark for each of its
checks, and is run as one, with seeds. Exit code: pytest's; 1 where a script prints a failed check, none
at all, or raises.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import softtopk

PASSED, FAILED = "✅", "❌"


def soft_topk(x: Tensor, k: Tensor, alpha: float | Tensor, dim: int = 1, largest: bool = True) -> Tensor:
    """Their call: k keeps dim with length 1, alpha may have either sign."""
    return softtopk.soft_topk(x, k.squeeze(dim), abs(alpha), dim=dim, largest=largest)


def log_soft_topk(x: Tensor, k: Tensor, alpha: float | Tensor, dim: int = 1, largest: bool = True) -> Tensor:
    return softtopk.log_soft_topk(x, k.squeeze(dim), abs(alpha), dim=dim, largest=largest)


def replace_package() -> None:
    """lapsum.topk is ours from here on, wherever the real one may be."""
    package, topk = ModuleType("lapsum"), ModuleType("lapsum.topk")
    topk.soft_topk, topk.log_soft_topk = soft_topk, log_soft_topk
    package.topk = topk
    sys.modules |= {"lapsum": package, "lapsum.topk": topk}


class Collected:
    """A plugin for pytest: the files in which it found tests."""

    def __init__(self):
        self.files: set[Path] = set()

    def pytest_collection_modifyitems(self, items):
        self.files = {item.path.resolve() for item in items}


def run_script(file: Path) -> bool:
    """Run a file of checks and say how they went; True if there were some and all passed."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    printed, raised = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(file), run_name="__main__")
    except Exception:
        raised = traceback.format_exc()
    suite, passed, failed, widest = "", Counter(), Counter(), {}
    for line in printed.getvalue().splitlines():
        if line.startswith("Testing "):
            suite = line.removeprefix("Testing ").split(" on ")[0]
        elif line.startswith((PASSED, FAILED)):
            check = (suite, line[1:].strip(" -").split(" (")[0].split(" [")[0])
            (passed if line.startswith(PASSED) else failed)[check] += 1
            if tolerance := re.search(r"atol=(1e-?\d+)", line):
                widest[check] = max(widest.get(check, 0.0), float(tolerance[1]))
    for check in dict.fromkeys([*passed, *failed]):
        tolerance = f", within atol {widest[check]:g}" if check in widest else ""
        print(f"{': '.join(check)}: {passed[check]} passed, {failed[check]} failed{tolerance}")
    if failed or raised:
        print(printed.getvalue(), raised, sep="\n")
    print(f"{file.name}: {passed.total()} checks passed, {failed.total()} failed")
    return bool(passed) and not failed and not raised


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", default=os.environ.get("SOFTTOPK_PEER_LAPSUM"), type=Path)
    args = parser.parse_args()
    if args.path is None or not args.path.exists():
        parser.error(f"PATH={args.path}: give the folder of LapSum's checkout, or set SOFTTOPK_PEER_LAPSUM")
    files = [args.path] if args.path.is_file() else sorted(args.path.rglob("test_*.py"))
    if not files:
        parser.error(f"{args.path} holds no test_*.py")
    sys.dont_write_bytecode = True  # their folder stays as it is
    replace_package()
    collected = Collected()
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", os.devnull]
    code = int(pytest.main([*options, *map(str, files)], plugins=[collected]))
    scripts = [f for f in files if f.resolve() not in collected.files]
    if code == pytest.ExitCode.NO_TESTS_COLLECTED and scripts:
        code = 0
    failed = [f for f in scripts if not run_script(f)]
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
