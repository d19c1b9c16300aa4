"""Run the kernels' tests under compute-sanitizer and write down what it found.

    python -m benchmarks.sanitizers                     # writes results/sanitizers-GPU.json
    python -m benchmarks.sanitizers --tools racecheck --processes 30   # the slowest alone: CPU-bound
    python -m benchmarks.sanitizers --tools racecheck --continue       # what ran out of --seconds
    python -m benchmarks.sanitizers --backends cuda     # where the other's kernels are as they were
    python -m benchmarks.sanitizers --of sparse         # the sparse path alone

memcheck and initcheck run without torch's caching allocator, whose blocks would hide an access
beyond a tensor or memory that was never written; initcheck also without the filling of uninitialised
memory. Left out are tests of what is not a kernel (fakes, streams that sleep, forks, compilers), of
CUDA graphs, which need that allocator and whose capture a tool can break, and the largest shapes.

What is not ours can be wrong too. racecheck reports races in the reductions of torch, whose kernels it
leaves alone, and in large products of cuBLAS, whose tests are left out, since these kernels fail
where it leaves them alone. initcheck does not see what 16-bit products of cuBLAS write: the first
kernel that reads one, torch's as well as ours, is reported. Tests of single steps, without products,
stand in for those left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, ROOT, commit, device_label, write

# What the kernels are of -> their tests.
FILES = {
    "operator": ("cuda_backend", "triton_backend", "log", "edges", "hard_topk"),
    "sparse": (
        *("topk_code", "sparse_code", "sparse_decode", "sparse_gradients", "sparse_encode", "gate", "shift"),
        *("budget", "activity", "optim", "relu_projection", "squared_error"),
    ),
}
LEFT_OUT = (
    *("many_rows", "long_rows", "two_billion", "stream", "graph", "compile_without", "without_a_gpu"),
    *("cpu", "reference", "without_clusters", "clusters_grow"),
)
BACKENDS = ("cuda", "triton")
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
LARGE_PRODUCTS = ("large_products",)
PRODUCTS = (*LARGE_PRODUCTS, "test_mixed_precision", "low_precision_weights", "products_are_added_up")
POISON = ("rows_of_silent_latents",)  # tests that need uninitialised memory to be filled
# Tool -> environment, tests left out besides, options of pytest.
TOOLS = {
    "memcheck": (UNCACHED, ("autotuning",), ()),
    "racecheck": ({}, LARGE_PRODUCTS, ()),
    "initcheck": (UNCACHED, ("autotuning", *PRODUCTS, *POISON), ("--no-poison",)),
}


def collect(tool: str, backends: Sequence[str], of: Sequence[str]) -> list[str]:
    """The names of the tests that a tool runs; RuntimeError if a file cannot be read."""
    left_out = (*LEFT_OUT, *TOOLS[tool][1], *(name for name in BACKENDS if name not in backends))
    chosen = " and ".join([f"({' or '.join(backends)})", *(f"not {name}" for name in left_out)])
    files = [f"tests/softtopk/test_{name}.py" for which in of for name in FILES[which]]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    listed = subprocess.run([*command, *files, "-k", chosen], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # or what is in that file would be left out, and nobody told
        raise RuntimeError(f"pytest cannot list {chosen}: {listed.stdout[-4000:]}{listed.stderr[-1000:]}")
    return [line for line in listed.stdout.splitlines() if "::" in line]


def run(tool: str, tests: list[str], seconds: float, gpu: int) -> dict:
    """One tool over some tests, in a process of its own: a sanitizer serves many processes slowly."""
    environment, _, options = TOOLS[tool]
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    if tool == "racecheck":  # initcheck has to see what torch's kernels write
        command += ["--kernel-name-exclude", "kns=at6native"]
    command += [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, *tests]
    environment = os.environ | environment | {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        code, printed = ended.returncode, ended.stdout + ended.stderr
    except subprocess.TimeoutExpired as expired:
        code, printed = None, ((expired.stdout or b"") + (expired.stderr or b"")).decode()
    done = dict(re.findall(r"^(\S+::.*) (PASSED|FAILED|SKIPPED|ERROR)\b", printed, re.M))
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", printed)
    # Without a summary, as of a process that was stopped, what had been printed counts.
    errors = sum(map(int, summaries)) or len(re.findall(r"^========= Error: ", printed, re.M))
    if code != 0:
        print(f"--- {tool}\n{printed[-4000:]}", flush=True)
    return {
        "exit_code": code,
        "tests": Counter(map(str.lower, done.values())),
        "errors": errors,
        "unfinished": [test for test in tests if test not in done],
    }


def together(
    tool: str, parts: list[dict], backends: Sequence[str] = BACKENDS, of: Sequence[str] = tuple(FILES)
) -> dict:
    """One row of several parts; what was stopped (exit code None) is left to --continue."""
    return {
        "tool": tool,
        "backends": [*backends],
        "of": [*of],
        "exit_codes": sorted({part["exit_code"] for part in parts} - {None}),
        "tests": dict(sum((Counter(part["tests"]) for part in parts), Counter())),
        "errors": sum(part["errors"] for part in parts),
        "commit": commit(),
        "unfinished": [test for part in parts for test in part["unfinished"]],
    }


def continued(before: dict, row: dict) -> dict:
    return row | {
        "exit_codes": sorted({*before["exit_codes"], *row["exit_codes"]}),
        "tests": dict(Counter(before["tests"]) + Counter(row["tests"])),
        "errors": before["errors"] + row["errors"],
    }


def key(row: dict) -> tuple:
    return row["tool"], *row["backends"], *row["of"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tools", nargs="+", default=list(TOOLS), choices=TOOLS, help="others keep their rows in the file"
    )
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--of", nargs="+", default=list(FILES), choices=FILES)
    parser.add_argument("--processes", type=int, default=4, help="of each tool, side by side")
    parser.add_argument("--seconds", type=float, default=3600, help="limit of each process")
    parser.add_argument(
        "--continue", action="store_true", dest="go_on", help="with the tests that were unfinished"
    )
    parser.add_argument("--gpus", type=int, nargs="+", help="which GPUs; default: all")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sanitizers-GPU.json")
    args = parser.parse_args()
    gpus = args.gpus or range(torch.cuda.device_count())
    path = args.out or RESULTS / f"sanitizers-{device_label('cuda')}.json"
    before = {key(row): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    keys = {tool: (tool, *args.backends, *args.of) for tool in args.tools}
    if args.go_on:
        for tool in args.tools:
            if before.get(keys[tool], {}).get("commit") != commit():
                parser.error(f"{path} has no row of {tool} at commit {commit()} to continue")
    with ThreadPoolExecutor(len(TOOLS) * args.processes) as pool:
        if args.go_on:
            tests = {tool: before[keys[tool]]["unfinished"] for tool in args.tools}
        else:
            tests = {tool: pool.submit(collect, tool, args.backends, args.of) for tool in args.tools}
            tests = {tool: listed.result() for tool, listed in tests.items()}
        running = {
            tool: [
                pool.submit(run, tool, names[i :: args.processes], args.seconds, gpus[i % len(gpus)])
                for i in range(min(args.processes, len(names)))
            ]
            for tool, names in tests.items()
        }
        rows = [
            together(tool, [part.result() for part in parts], args.backends, args.of)
            for tool, parts in running.items()
        ]
    if args.go_on:
        rows = [continued(before[key(row)], row) for row in rows]
    for row in rows:
        print({**row, "unfinished": len(row["unfinished"])})
    kept = [row for known, row in before.items() if known not in keys.values()]
    write(path, [*kept, *rows])
    sys.exit(any(row["exit_codes"] != [0] or row["errors"] or row["unfinished"] for row in rows))


if __name__ == "__main__":
    main()
