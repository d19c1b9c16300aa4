"""What one small call costs: microseconds of the host, and in a row of calls, beside torch's own.

    python -m benchmarks.overhead                 # on the GPU if there is one
    python -m benchmarks.overhead --device cpu

host_us is the time until a call returns, over short bursts between which the device is waited for, so
that no launch waits for room; call_us is the time of a call in a long row of them, which ends when the
device does, and so the larger of the host's and the device's share. Functions take turns, so that a
machine's other load falls on all; minimum and median. Rows of the result file: call, tape, rows, n,
host_us, host_us_median, call_us, call_us_median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, device_label, write
from softtopk import hard_topk, log_soft_topk, soft_topk

SHAPES = ((1, 64), (1, 4096), (8, 4096), (64, 4096))
K = 8


def calls(rows: int, n: int, device: str) -> dict[tuple[str, bool], Callable[[], object]]:
    """(name, with gradients) -> the call."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0)).to(device)
    leaf, v = x.clone().requires_grad_(), torch.randn_like(x)
    k = torch.full((rows,), float(K), device=device)
    alpha = torch.tensor(0.1, device=device)
    without = {
        "soft_topk": lambda: soft_topk(x, K),
        "soft_topk, k a tensor": lambda: soft_topk(x, k),
        "soft_topk, k and alpha tensors": lambda: soft_topk(x, k, alpha),
        "soft_topk(hard=True)": lambda: soft_topk(x, K, hard=True),
        "log_soft_topk": lambda: log_soft_topk(x, K),
        "hard_topk": lambda: hard_topk(x, K),
        "hard_topk(return_indices=True)": lambda: hard_topk(x, K, return_indices=True),
        "torch.topk": lambda: torch.topk(x, K),
        "torch.softmax": lambda: torch.softmax(x, -1),
    }
    tape = {
        "soft_topk": lambda: soft_topk(leaf, K),
        "soft_topk, forward and backward": lambda: torch.autograd.grad(soft_topk(leaf, K), leaf, v),
        "torch.softmax": lambda: torch.softmax(leaf, -1),
        "torch.softmax, forward and backward": lambda: torch.autograd.grad(torch.softmax(leaf, -1), leaf, v),
    }
    return {
        (name, needed): c for needed, group in ((False, without), (True, tape)) for name, c in group.items()
    }


def burst_us(call: Callable[[], object], count: int, wait: Callable[[], None], ends_waiting: bool) -> float:
    wait()
    started = time.perf_counter_ns()
    for _ in range(count):
        call()
    if ends_waiting:
        wait()
    return (time.perf_counter_ns() - started) / count / 1e3


def measure(rows: int, n: int, device: str, rounds: int) -> list[dict]:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    made = calls(rows, n, device)
    results = {key: ([], []) for key in made}
    for round_ in range(rounds + 1):
        for (name, tape), call in made.items():
            with torch.set_grad_enabled(tape):
                host, whole = burst_us(call, 20, wait, False), burst_us(call, 100, wait, True)
            if round_ > 0:  # the first warms up
                results[name, tape][0].append(host)
                results[name, tape][1].append(whole)
    return [
        {
            "call": name,
            "tape": tape,
            "rows": rows,
            "n": n,
            "host_us": round(min(host), 2),
            "host_us_median": round(statistics.median(host), 2),
            "call_us": round(min(whole), 2),
            "call_us_median": round(statistics.median(whole), 2),
        }
        for (name, tape), (host, whole) in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=50, help="turns of every call, default %(default)s")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/overhead-DEVICE.json")
    args = parser.parse_args()
    table = []
    for shape in SHAPES:
        table += (found := measure(*shape, args.device, args.rounds))
        for row in found:
            name = row["call"] + (", gradients on" if row["tape"] else "")
            print(
                f"{row['rows']:>3} x {row['n']:<5} {name:48} host {row['host_us']:7.2f} us"
                f" (median {row['host_us_median']:7.2f})   in a row {row['call_us']:7.2f}"
            )
    write(args.out or RESULTS / f"overhead-{device_label(args.device)}.json", table)


if __name__ == "__main__":
    main()
