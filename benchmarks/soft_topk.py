"""The speed table of soft_topk and hard_topk: every cell of bars.py, checked, timed and held to its bar.

    python -m benchmarks.soft_topk                            # all sections, on the GPU if there is one
    python -m benchmarks.soft_topk --sections headline hard --peers torch.topk\\(64\\) CUB
    python -m benchmarks.soft_topk --device cpu
    python -m benchmarks.soft_topk --sections                 # measures nothing: notes.json anew

Sections on a GPU: headline, large_k, adversarial, odd, hard, small, overhead, triton, sweep; on a CPU: cpu,
sweep. Every result is compared with the float64 reference on two of its rows before it is timed. A line is
printed for each cell, and benchmarks/results/soft_topk-DEVICE.json is updated on the way. A row: section,
op, pass, backend, dtype, rows, n, k, alpha, distribution; ms, floor_ms, fraction (floor / ms), max_error (of
p, or of grad_x over its row's largest; wrong values and indices of hard_topk), peers (name -> ms), commit;
error where it could not be measured; note where it misses its bar and notes.json explains it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import softtopk
from benchmarks import bars, measure, result_file, small, speed_peers
from benchmarks.bars import Cell
from benchmarks.environment import RESULTS, device_label

SECTIONS = {
    "cuda": (*("headline", "large_k", "adversarial", "odd", "hard", "small", "overhead", "triton", "sweep"),),
    "cpu": ("cpu", "sweep"),
}
LAUNCH_BOUND = {
    "small": small.small,
    "overhead": small.overhead,
    "sweep_n": small.sweep,
    "sweep_rows": small.sweep,
}
SAVE_S = 20  # at least so much between two writings of the file


def chosen(args: argparse.Namespace, backends: list[str]) -> list[Cell]:
    """The cells asked for, those on the same data beside each other, after those they are held against."""
    cells = bars.cells(args.device) + small.sweep_cells(args.device, backends)
    limits = {"n": args.lengths, "dtype": args.dtypes, "alpha": args.alphas}
    picked = []
    for cell in cells:
        if cell.section.removesuffix("_n").removesuffix("_rows") not in args.sections:
            continue
        if cell.backend not in (*backends, "torch"):
            continue
        if all(v is None or getattr(cell, name) in (*v, None) for name, v in limits.items()):
            picked.append(cell)
    return sorted(
        picked, key=lambda c: (c.section in LAUNCH_BOUND, c.section == "odd", *measure.same_data(c))
    )


def rows_of(group: list[Cell], peers: list[speed_peers.Peer], device: str) -> Iterator[dict]:
    """Measures cells on the same data."""
    for section, part in itertools.groupby(group, key=lambda c: c.section in LAUNCH_BOUND and c.section):
        if not section:
            yield from measure.of_one_x(list(part), peers, device)
            continue
        for cell in part:
            yield LAUNCH_BOUND[section](cell, device)


def line(cell: Cell, row: dict, reason: str | None) -> str:
    """One cell as it is printed."""
    alpha = "" if row["alpha"] is None else f"alpha={row['alpha']:g}"
    words = [f"{cell.section:11} {cell.op:10} {cell.run:16} {cell.backend:7} {cell.dtype:8}"]
    words.append(f"{cell.rows:6}x{cell.n:<7} k={cell.k:7} {alpha:12} {cell.distribution:12}")
    if row["ms"] is not None:
        words.append(f"{row['ms']:9.4f} ms")
    if row["fraction"] is not None:
        words.append(f"{row['fraction']:6.1%}")
    words.append(("met" if reason is None else f"UNMET: {reason}") if cell.bar else reason or "")
    return " ".join([*words, *(f"[{name} {ms:g}]" for name, ms in row["peers"].items())])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="*", help="default: all of the device")
    parser.add_argument("--backends", nargs="+", help="default: all that run on the device")
    parser.add_argument("--dtypes", nargs="+", choices=bars.DTYPES)
    parser.add_argument("--alphas", nargs="+", type=float)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument(
        "--peers", nargs="*", choices=speed_peers.PEERS, help="default: all that are there; none for none"
    )
    parser.add_argument("--remark", help="what the machine was doing besides, for the file's environment")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/soft_topk-DEVICE.json")
    args = parser.parse_args()
    known = SECTIONS[args.device]
    args.sections = known if args.sections is None else args.sections
    if unknown := set(args.sections) - set(known):
        parser.error(f"{args.device} has no section {', '.join(unknown)}; it has {', '.join(known)}")
    path = args.out or RESULTS / f"soft_topk-{device_label(args.device)}.json"

    there = softtopk.available_backends()
    ours = ("cpu",) if args.device == "cpu" else ("cuda", "triton")
    backends = [b for b in args.backends or ours if there[b] is None]
    for name in set(args.backends or ours) - set(backends):
        print(f"{name}: {there[name]}")
    timed = args.peers
    if timed is None and not {"headline", "hard", "cpu"} & set(args.sections):
        timed = []
    if timed is None and args.device != "cpu":
        timed = [name for name in speed_peers.PEERS if name != "reference"]  # compiled there
    peers, versions = speed_peers.load(args.device, timed)
    print("\n".join(f"{name}: {version}" for name, version in versions.items()))

    cells = chosen(args, backends)
    filtered = any((args.dtypes, args.alphas, args.lengths, args.backends))
    whole = set() if filtered else {c.section for c in cells}
    rows: list[dict] = []
    by_key = {bars.key(cell.keys()): cell for cell in cells}
    all_rows = {bars.key(row): row for row in result_file.load(path)["rows"]}
    met = total = 0
    started = saved = time.perf_counter()
    for _, part in itertools.groupby(cells, key=measure.same_data):
        group = list(part)
        for row in rows_of(group, peers, args.device):
            rows.append(row)
            all_rows[bars.key(row)] = row
            cell = by_key[bars.key(row)]
            reason = bars.unmet(cell, row, all_rows)
            met, total = met + (cell.bar and reason is None), total + cell.bar
            print(line(cell, row, reason), flush=True)
        if args.device != "cpu":
            torch.cuda.empty_cache()
        if time.perf_counter() - saved > SAVE_S:
            result_file.update(path, args.device, rows, set(), versions, args.remark)
            saved = time.perf_counter()
    result_file.update(path, args.device, rows, whole, versions, args.remark)
    print(f"{met} of {total} cells met, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
