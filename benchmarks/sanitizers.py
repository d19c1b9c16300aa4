"""Run the kernels' tests under compute-sanitizer and write down what it found.

    python -m benchmarks.sanitizers                     # writes results/sanitizers-GPU.json
    python -m benchmarks.sanitizers --tools racecheck --processes 30   # the slowest alone: CPU-bound

memcheck and initcheck run without torch's caching allocator, whose blocks would hide an access
beyond a tensor or memory that was never written, and so without the tests that capture a CUDA graph;
initcheck also without the filling of uninitialised memory. Left out are tests of what is not a
kernel (fakes, streams that sleep, forks, compilers), the largest shapes, and torch's own kernels (in
whose reductions racecheck reports races).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, ROOT, commit, device_label, write

FILES = ("cuda_backend", "triton_backend", "log", "edges", "hard_topk")
LEFT_OUT = (
    *("many_rows", "long_rows", "two_billion", "stream", "compile_without", "without_a_gpu"),
    *("cpu", "reference", "without_clusters", "clusters_grow"),
)
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Tool -> environment, tests left out besides, options of pytest.
TOOLS = {
    "memcheck": (UNCACHED, ("graph", "autotuning"), ()),
    "racecheck": ({}, (), ()),
    "initcheck": (UNCACHED, ("graph", "autotuning"), ("--no-poison",)),
}


def collect(tool: str) -> list[str]:
    """The names of the tests that a tool runs."""
    chosen = " and ".join(["(cuda or triton)", *(f"not {name}" for name in (*LEFT_OUT, *TOOLS[tool][1]))])
    files = [f"tests/softtopk/test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    listed = subprocess.run([*command, *files, "-k", chosen], cwd=ROOT, capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if "::" in line]


def run(tool: str, tests: list[str], seconds: float, gpu: int) -> dict:
    """One tool over some tests, in a process of its own: a sanitizer serves many processes slowly."""
    environment, _, options = TOOLS[tool]
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    command += ["--kernel-name-exclude", "kns=at6native"]
    command += [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, *tests]
    environment = os.environ | environment | {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        code, printed = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        code, printed = None, ((expired.stdout or b"") + (expired.stderr or b"")).decode()
    counts = Counter(map(str.lower, re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR)\b", printed, re.M)))
    counts["unfinished"] = len(tests) - counts.total()
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", printed)
    # Without a summary, as of a process that was stopped, what had been printed counts.
    errors = sum(map(int, summaries)) or len(re.findall(r"^========= Error: ", printed, re.M))
    if code != 0:
        print(f"--- {tool}\n{printed[-4000:]}", flush=True)
    return {"exit_code": code, "tests": counts, "errors": errors}


def together(tool: str, parts: list[dict]) -> dict:
    tests = sum((part["tests"] for part in parts), Counter())
    codes = sorted({part["exit_code"] for part in parts}, key=str)
    errors = sum(part["errors"] for part in parts)
    return {"tool": tool, "exit_codes": codes, "tests": dict(tests), "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tools", nargs="+", default=list(TOOLS), choices=TOOLS, help="others keep their rows in the file"
    )
    parser.add_argument("--processes", type=int, default=4, help="of each tool, side by side")
    parser.add_argument("--seconds", type=float, default=3600, help="limit of each process")
    parser.add_argument("--gpus", type=int, nargs="+", help="which GPUs; default: all")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sanitizers-GPU.json")
    args = parser.parse_args()
    gpus = args.gpus or range(torch.cuda.device_count())
    with ThreadPoolExecutor(len(TOOLS) * args.processes) as pool:
        tests = dict(zip(args.tools, pool.map(collect, args.tools), strict=True))
        running = {
            tool: [
                pool.submit(run, tool, names[i :: args.processes], args.seconds, gpus[i % len(gpus)])
                for i in range(min(args.processes, len(names)))
            ]
            for tool, names in tests.items()
        }
        rows = [together(tool, [part.result() for part in parts]) for tool, parts in running.items()]
    for row in rows:
        print(row)
    path = args.out or RESULTS / f"sanitizers-{device_label('cuda')}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in kept if row["tool"] not in args.tools]
    write(path, kept + [row | {"commit": commit()} for row in rows])
    sys.exit(any(row["exit_codes"] != [0] or row["errors"] for row in rows))


if __name__ == "__main__":
    main()
