"""What Nsight Compute sees of the kernels at the headline shapes, as text beside the results.

    python -m benchmarks.ncu                                  # writes results/soft_topk-GPU-profile.txt
    python -m benchmarks.ncu --lengths 16384 --dtypes float32 --alphas 1 1e-2 1e-4

For every shape, forward and backward: time, bytes moved and bandwidth, achieved and possible occupancy,
registers, shared memory, and the reasons for which warps waited, as shares of the time between two
instructions of a warp. The clocks are left alone (--clock-control none). A second process of this module
launches the kernels under ncu, each inside an NVTX range that names it.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks import bars
from benchmarks.environment import RESULTS, ROOT, device_label, environment
from benchmarks.measure import budgets, draw
from benchmarks.tables import caption
from softtopk import dispatch

SECTIONS = ("LaunchStats", "Occupancy", "WarpStateStats")
DURATION, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
PEAK = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
ACHIEVED, POSSIBLE = (
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__maximum_warps_per_active_cycle_pct",
)
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
LABEL = re.compile(r"cell\[([^\]]+)\]")


def parse(printed: str) -> list[dict]:
    """The kernels in what `ncu --csv` printed, in base units: {"kernel", "label", metric: value}.

    Both layouts are read: a column for each metric with a line of units below the header (--page raw), and
    a line for each metric. The label is that of the NVTX range, None where no column has it.
    """
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"ncu printed no table: {printed.strip()[-300:]}")
    table = (line for line in lines[start:] if line.startswith('"'))
    found: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(table))):
        if not row["ID"]:  # units
            continue
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"], "label": None})
        if label := LABEL.search(" ".join(str(value) for value in row.values())):
            kernel["label"] = label[1]
        one = {row["Metric Name"]: row["Metric Value"]} if "Metric Name" in row else row
        for name, value in one.items():
            try:
                kernel[name] = float(value.replace(",", ""))
            except (AttributeError, ValueError):  # a name, a shape, "n/a"
                continue
    return list(found.values())


def stalls(kernel: dict) -> list[tuple[str, float]]:
    """Why warps waited, as shares of all cycles between two instructions, the largest first."""
    cycles = {m[1]: value for name, value in kernel.items() if (m := STALL.fullmatch(name))}
    cycles = {name: value for name, value in cycles.items() if not name.endswith("_not_issued")}
    total = sum(cycles.values()) or 1.0
    waits = ((name, value / total) for name, value in cycles.items() if name != "selected")
    return sorted(waits, key=lambda pair: -pair[1])


def describe(kernel: dict) -> str:
    """One kernel in a few lines."""
    kernel = defaultdict(lambda: math.nan, kernel)  # what was not collected
    ms = kernel[DURATION] / 1e6
    read, written = kernel[READ], kernel[WRITTEN]
    waits = ", ".join(f"{name} {share:.0%}" for name, share in stalls(kernel)[:4])
    shared = sum(kernel[f"launch__shared_mem_per_block_{kind}"] for kind in ("static", "dynamic"))
    return "\n".join(
        [
            f"{kernel['label'] or 'unnamed'}: {re.split('[<(]', kernel['kernel'])[0]}",
            f"  {ms:.3f} ms, {read / 1e6:.0f} MB read and {written / 1e6:.0f} MB written,"
            f" {(read + written) / kernel[DURATION] / 1e3:.2f} TB/s ({kernel[PEAK]:.0f}% of the peak)",
            f"  occupancy {kernel[ACHIEVED]:.0f}% of {kernel[POSSIBLE]:.0f}% possible,"
            f" {kernel['launch__registers_per_thread']:.0f} registers,"
            f" {shared / 1024:.1f} KiB shared, {kernel['launch__block_size']:.0f} threads a block,"
            f" {kernel['launch__grid_size']:.0f} blocks",
            f"  warps wait for: {waits}",
        ]
    )


def shapes(args: argparse.Namespace) -> list[tuple[int, str, float]]:
    return list(itertools.product(args.lengths, args.dtypes, args.alphas))


def label(run: str, n: int, dtype: str, alpha: float) -> str:
    return f"{run} {dtype} {bars.large_rows(n, dtype)}x{n} alpha={alpha:g}"


def launch(args: argparse.Namespace) -> None:
    """Runs under ncu: every kernel once to warm up, and once between the profiler's start and stop."""
    kernels = dispatch.module(args.backend)
    for (n, dtype), group in itertools.groupby(shapes(args), key=lambda shape: shape[:2]):
        rows = bars.large_rows(n, dtype)
        x = draw("relu", rows, n, dtype, "cuda")
        v, k = torch.randn_like(x), budgets("20..120", rows, n, "cuda")
        for _, _, alpha in group:
            _, solution = kernels.soft_topk_forward(x, k, alpha, True)
            kernels.soft_topk_backward(x, solution, alpha, v, True)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            with torch.cuda.nvtx.range(f"cell[{label('forward', n, dtype, alpha)}]"):
                kernels.soft_topk_forward(x, k, alpha, True)
            with torch.cuda.nvtx.range(f"cell[{label('backward', n, dtype, alpha)}]"):
                kernels.soft_topk_backward(x, solution, alpha, v, True)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def profile(args: argparse.Namespace) -> list[dict]:
    """Runs `launch` under ncu and names its kernels."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--nvtx"]
    command += ["--csv", "--page", "raw", "--print-units", "base"]
    command += [word for name in SECTIONS for word in ("--section", name)]
    command += ["--metrics", ",".join([DURATION, READ, WRITTEN, PEAK])]
    command += [sys.executable, "-m", "benchmarks.ncu", "--launch", *sys.argv[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        found = parse(done.stdout)
    except ValueError:
        sys.exit(f"ncu ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-2000:]}")
    expected = [label(run, *shape) for shape in shapes(args) for run in ("forward", "backward")]
    if len(found) == len(expected):  # one kernel each: in the order of the launches
        for kernel, name in zip(found, expected, strict=True):
            kernel["label"] = kernel["label"] or name
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=bars.LENGTHS)
    parser.add_argument("--dtypes", nargs="+", default=bars.DTYPES, choices=bars.DTYPES)
    parser.add_argument("--alphas", nargs="+", type=float, default=[1e-2])
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton"))
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/soft_topk-GPU-profile.txt")
    args = parser.parse_args()
    if args.launch:
        return launch(args)
    if shutil.which("ncu") is None:
        sys.exit("ncu, of NVIDIA Nsight Compute, is not on the PATH")
    found = profile(args)
    path = args.out or RESULTS / f"soft_topk-{device_label('cuda')}-profile.txt"
    path.write_text("\n\n".join([caption(environment()), *map(describe, found)]) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
