"""The tables of encoding throughput, for benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Callable

from benchmarks.encoding import position, wrong
from benchmarks.sparse_tables import MARKS, NOTHING, files, machine
from benchmarks.tables import caption, markdown

OF_THROUGHPUT = (
    "Thousands of tokens a second; in brackets the time of the product alone over that of the call."
)
OF_MEMORY = "The largest memory of a call, without weights and activations, in MiB:"


def setting(row: dict) -> tuple:
    return tuple(row[name] for name in ("d", "k", "dtype", "rows"))


def by_length(rows: list[dict], text: Callable[[dict], str]) -> str:
    """A line for each op, model and path, a column for each n."""
    lengths = sorted({row["n"] for row in rows})
    lines: dict[tuple, dict[int, str]] = {}
    for row in sorted(rows, key=position):
        cell = "error ✗" if row["ms"] is None else text(row) + MARKS[wrong(row) is None]
        lines.setdefault((row["op"], row["model"], row["path"]), {})[row["n"]] = cell
    body = [[*name, *(cells.get(n, "") for n in lengths)] for name, cells in lines.items()]
    return markdown(["", "", "", *(f"n = {n:,}" for n in lengths)], body)


def throughput(row: dict) -> str:
    thousands = row["tokens_per_s"] / 1e3
    tokens = f"{thousands:,.0f}" if thousands >= 100 else f"{thousands:.3g}"
    return f"{tokens} ({row['fraction']:.0%})" if "fraction" in row else tokens


def memory(row: dict) -> str:
    return f"{row['peak_bytes'] / 2**20:,.0f}"


def encoding() -> str:
    """Thousands of tokens a second, and what a call allocates, by machine and width."""
    parts = []
    for path in files("encoding"):
        data = json.loads(path.read_text())
        parts += [f"### {machine(data)}", f"{caption(data['environment'])}."]
        for at in dict.fromkeys(setting(row) for row in data["rows"]):
            rows = [row for row in data["rows"] if setting(row) == at]
            about = "d = {}, k = {}, {}, {} tokens a call".format(*at)
            streamed = [f", {row['tokens']:,} on disk" for row in rows if "tokens" in row][:1]
            parts += ["".join(["#### ", about, *streamed]), OF_THROUGHPUT, by_length(rows, throughput)]
            if allocating := [row for row in rows if row.get("peak_bytes") is not None]:
                parts += [OF_MEMORY, by_length(allocating, memory)]
    return "\n\n".join(parts) or NOTHING


TABLES = {"encoding": encoding}
