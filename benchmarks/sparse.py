"""The sparse path's kernels: every cell of sparse_bars.py, checked, timed beside peers and held to its bars.

    python -m benchmarks.sparse                                # all sections, on the GPU if there is one
    python -m benchmarks.sparse --sections decode backward     # a part; the rest of the file is kept
    python -m benchmarks.sparse --backends cuda triton         # Adam has no Triton kernel
    python -m benchmarks.sparse --quick --device cpu           # small shapes: whether everything runs

Sections: selection (from randn pre-activations to a code, and its backward), selection_n (its cost against
n), decode, backward (the code's order by latent, then the gradients of weights and values), adam, estimator
(the wide one). Results are compared with float64 before they are timed. Peers: `python -m
benchmarks.sparse_peers`. benchmarks/results/sparse-DEVICE.json holds the rows and every bar with what was
found. A row: section, op, pass, backend, dtype, rows, n, d, k, latents; ms, floor_ms, fraction (floor / ms),
bytes (what has to be moved at the least; floor_ms is the time of the fastest copy that moves as many),
max_error, peers (name -> ms), commit; met where it has bars; error where it could not be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import softtopk
from benchmarks import sparse_bars, sparse_dense, sparse_measure, sparse_peers
from benchmarks.environment import RESULTS, commit, device_label, environment, write
from benchmarks.sparse_bars import SECTIONS, Cell
from benchmarks.sparse_measure import failed

SAVE_S = 20  # at least so much between two writings of the file
PARTS = ("transposition_ms", "gradients_ms", "bit_equal")


def small(cell: Cell) -> Cell:
    """A cell of the same kind that takes no time."""
    n = min(cell.n, 4096 if cell.section == "selection_n" else 1024)
    rows = 8 if cell.d is None else 64
    d = None if cell.d is None else min(cell.d, 64)
    k = cell.k if ".." in cell.k or not cell.k else "16"
    return dataclasses.replace(cell, rows=rows, n=n, d=d, k=k, conditions=())


def chosen(args: argparse.Namespace) -> list[Cell]:
    """The cells asked for, those on the same data beside each other."""
    cells = [cell for backend in args.backends for cell in sparse_bars.cells(backend, args.sections)]
    if args.dtypes is not None:  # Adam's masters are float32 whatever the products are in
        cells = [cell for cell in cells if cell.dtype in args.dtypes or cell.section == "adam"]
    if args.lengths is not None:
        cells = [cell for cell in cells if cell.n in args.lengths]
    if args.quick:
        cells = [small(cell) for cell in cells]
    order = list(SECTIONS)
    unique = {sparse_bars.key(cell.keys()): cell for cell in cells}  # small ones may fall together
    return sorted(unique.values(), key=lambda c: (order.index(group(c)[0]), group(c)[1:]))


def group(cell: Cell) -> tuple:
    """What cells that are measured together have in common."""
    if cell.section in ("adam", "estimator"):
        return cell.section, *(str(value) for value in cell.keys().values())
    section = "decode" if cell.section == "backward" else cell.section
    return section, cell.backend, cell.rows, cell.n, cell.d or 0, cell.latents, cell.dtype


def rows_of(
    cells: list[Cell], peers: list[sparse_peers.Peer], device: str, per_byte: float
) -> Iterator[dict]:
    """Measures cells of one group."""
    first = cells[0]
    if first.section in ("selection", "selection_n"):
        yield from sparse_measure.selection(cells, device, first.section == "selection")
    elif first.section in ("decode", "backward"):
        yield from sparse_measure.codes(cells, peers, device, per_byte)
    else:
        measure = {"adam": sparse_dense.adam, "estimator": sparse_dense.estimator}[first.section]
        for cell in cells:
            yield measure(cell, device, per_byte)


def safely(cells: list[Cell], *arguments) -> Iterator[dict]:
    """`rows_of`; an error becomes a row that says so."""
    found = []
    try:
        for row in rows_of(cells, *arguments):
            found.append(sparse_bars.key(row))
            yield row
    except Exception as error:  # out of memory while the data were drawn, say
        yield from (failed(c, error) for c in cells if sparse_bars.key(c.keys()) not in found)


def line(cell: Cell, row: dict) -> str:
    """One cell as it is printed."""
    words = [f"{cell.section:11} {cell.backend:6} {sparse_bars.label(cell):75}"]
    if row["ms"] is None:
        return " ".join([*words, row["error"]])
    words.append(f"{row['ms']:9.4f} ms {row['fraction']:6.1%}")
    words += [f"[{name} {ms:g}]" for name, ms in row["peers"].items()]
    words += [
        f"{name}={row[name]}" for name in ("transposition_ms", "gradients_ms", "bit_equal") if name in row
    ]
    return " ".join([*words, f"error {row['max_error']:.1e}" if row["max_error"] is not None else ""])


def numbers_in(row: dict) -> tuple:
    """An order of a section's rows."""
    return row["backend"], row["op"], row["pass"], row["latents"], row["dtype"], row["n"], row["d"] or 0


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"environment": {}, "peers": {}, "rows": []}


def update(
    path: Path, device: str, new: list[dict], whole: set[tuple[str, str]], peers: dict[str, str]
) -> None:
    """Merge what was measured into a file; `whole`: sections, each with a backend, measured in full, whose
    other rows go. A row keeps the commit at which it was measured."""
    old = load(path)
    kept = [row for row in old["rows"] if (row["section"], row["backend"]) not in whole]
    rows = {sparse_bars.key(row): row for row in kept}
    rows |= {sparse_bars.key(row): {**row, "commit": commit()} for row in new}
    order = list(SECTIONS)
    merged = sorted(
        rows.values(), key=lambda row: (order.index(row["section"]), *map(str, sparse_bars.key(row)))
    )
    bars = sparse_bars.verdicts(merged) if device != "cpu" else []
    of = {sparse_bars.key(c.keys()): sparse_bars.label(c) for c in sparse_bars.cells() if c.conditions}
    for row in merged:
        row.pop("met", None)
        if device != "cpu" and (label := of.get(sparse_bars.key(row))):
            row["met"] = all(bar.met for bar in bars if bar.of == label)
    known = {name: text for name, text in old.get("peers", {}).items() if name not in peers}
    machine = environment() if new else old["environment"]
    write(path, merged, environment=machine, peers=known | peers, bars=[bar._asdict() for bar in bars])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--backends", nargs="+", help="default: cuda, on a CPU cpu")
    parser.add_argument(
        "--dtypes", nargs="+", choices=sparse_bars.DTYPES, help="adam is measured in any case"
    )
    parser.add_argument("--lengths", nargs="+", type=int, help="only cells of these n")
    parser.add_argument("--quick", action="store_true", help="small shapes; the file goes to --out alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sparse-DEVICE.json")
    args = parser.parse_args()
    args.backends = args.backends or ["cpu" if args.device == "cpu" else "cuda"]
    there = softtopk.available_backends()
    if absent := [name for name in args.backends if there[name] is not None]:
        parser.error(f"{absent[0]}: {there[absent[0]]}")
    path = args.out
    if path is None and not args.quick:
        path = RESULTS / f"sparse-{device_label(args.device)}.json"
    peers, versions = sparse_peers.load(args.device)
    print("\n".join(f"{name}: {version}" for name, version in versions.items()))

    cells = chosen(args)
    by_key = {sparse_bars.key(cell.keys()): cell for cell in cells}
    whole = set()
    if args.dtypes is None and args.lengths is None:
        whole = set(itertools.product(args.sections, args.backends))
    speed = sparse_measure.bandwidth(args.device)
    print(f"a copy moves {speed / 1e12:.2f} TB/s")
    rows: list[dict] = []
    started = saved = time.perf_counter()
    for _, part in itertools.groupby(cells, key=group):
        for row in safely(list(part), peers, args.device, 1e3 / speed):
            rows.append(row)
            print(line(by_key[sparse_bars.key(row)], row), flush=True)
        if args.device != "cpu":
            torch.cuda.empty_cache()
        if path is not None and time.perf_counter() - saved > SAVE_S:
            update(path, args.device, rows, set(), versions)
            saved = time.perf_counter()
    if path is not None:
        update(path, args.device, rows, whole, versions)
    if args.device != "cpu":
        bars = sparse_bars.verdicts(rows)
        print(
            "\n".join(f"{'met  ' if bar.met else 'UNMET'} {bar.of}: {bar.asked}, {bar.found}" for bar in bars)
        )
    if errors := [row["error"] for row in rows if row.get("error")]:
        print(f"{len(errors)} cells could not be measured, the first: {errors[0]}")
    print(f"{len(rows)} cells, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
