"""The tables of the speed results, for README.md and benchmarks/README.md.

A cell that misses its bar is marked ✗, one that was not measured is an en dash, and misses it too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import bars, plots
from benchmarks.bars import ALPHAS, HEADLINE, LENGTHS, PEER_ALPHA, TOPK, Cell, Verdict
from benchmarks.environment import RESULTS
from benchmarks.tables import caption, load, markdown

TITLES = {
    "headline": "The headline: ReLU of a normal sample, k random in 20…120",
    "large_k": "Large budgets: k = n/64, n/8, n/2",
    "adversarial": "Rows made to be hard",
    "odd": "Lengths that are a multiple of nothing",
    "hard": "hard_topk with indices and values, k = 64; the fraction is that of reading x once",
    "small": "1 to 64 rows, k = 64; in brackets how many times as fast as torch.topk(64)",
    "overhead": "How long one call holds the host up",
    "triton": "The Triton backend",
    "cpu": "Calls on the CPU, k random in 20…120; hard_topk with k = 64",
}
NAMES = {
    "dtype": "dtype",
    "run": "pass",
    "op": "",
    "backend": "",
    "distribution": "rows",
    "k": "k",
    "rows": "rows",
}


def files() -> list[Path]:
    return sorted(RESULTS.glob("soft_topk-*.json"), reverse=True)


def device(path: Path) -> str:
    """ "cpu", or "cuda" for a file that is named by a GPU."""
    return "cpu" if path.stem.endswith("-cpu") else "cuda"


def text(cell: Cell, row: dict | None, reason: str | None) -> str:
    """A measured cell: milliseconds and, in brackets, the fraction of the floor."""
    if row is None:
        return "–"
    if row["ms"] is None:
        return "error ✗"
    if cell.section in ("small", "overhead"):
        found = f"{1e3 * row['ms']:.1f} µs"
        if cell.section == "small":
            found += f" ({row['peers'][TOPK] / row['ms']:.1f}×)"
    else:
        found = f"{row['ms']:.3g} ({row['fraction']:.0%})"
    return f"{found} ✗" if reason else found


def grid(verdicts: list[Verdict], cell_text: Callable[..., str] = text) -> str:
    """A column for each length, a line for each combination of everything else that varies."""
    cells = [cell for cell, _, _ in verdicts]
    columns = sorted({cell.n for cell in cells})
    names = [name for name in NAMES if len({getattr(cell, name) for cell in cells}) > 1]
    if "rows" in names and cells[0].section != "small":
        names.remove("rows")
    alphas = len({cell.alpha for cell in cells if cell.alpha is not None}) > 1

    def label(cell: Cell) -> tuple[str, ...]:
        found = tuple(str(getattr(cell, name)) for name in names)
        return (*found, "" if cell.alpha is None else f"{cell.alpha:g}") if alphas else found

    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for cell, row, reason in verdicts:
        lines.setdefault(label(cell), {})[cell.n] = cell_text(cell, row, reason)
    order = sorted(lines, key=lambda found: found[:-1] if alphas else found)  # alphas stay as they come
    body = [[*found, *(lines[found].get(n, "") for n in columns)] for found in order]
    header = [*(NAMES[name] for name in names), *(["alpha"] if alphas else []), *map(str, columns)]
    return markdown(header, body)


def fractions(file: str) -> str:
    """The headline's fractions of the floor with their bars, for README.md."""
    data = load(file)
    found = {
        (c.run, c.dtype, c.alpha, c.n): (row, reason)
        for c, row, reason in bars.verdicts("cuda", data["rows"])
        if c.section == "headline"
    }

    def percent(row: dict | None, reason: str | None) -> str:
        if row is None or row["fraction"] is None:
            return "–"
        return f"{row['fraction']:.0%}{' ✗' if reason else ''}"

    body = []
    for (run, dtype), least in HEADLINE.items():
        body.append([f"{dtype} {run}", "bar", *(f"≥ {fraction:.0%}" for fraction in least)])
        for alpha in ALPHAS:
            values = (percent(*found[run, dtype, alpha, n]) for n in LENGTHS)
            body.append(["", f"alpha = {alpha:g}", *values])
    header = ["fraction of the floor", "", *(f"n = {n}" for n in LENGTHS)]
    return f"{markdown(header, body)}\n\n{caption(data['environment'])}. {count(file)}"


def count(file: str) -> str:
    verdicts = bars.verdicts(device(Path(file)), load(file)["rows"])
    met = sum(reason is None for _, _, reason in verdicts)
    absent = sum(row is None for _, row, _ in verdicts)
    return f"{met} of the {len(verdicts)} bars are met, {absent} cells not measured yet."


def peers(file: str, section: str, run: str, dtype: str, op: str = "soft_topk") -> str:
    """Milliseconds of ours and of every peer that was timed, at alpha = PEER_ALPHA."""
    rows = [
        row
        for row in load(file)["rows"]
        if (row["section"], row["pass"], row["dtype"], row["op"]) == (section, run, dtype, op)
        and row["alpha"] in (PEER_ALPHA, None)
        and row["ms"] is not None
    ]
    if not rows:
        return ""
    names = sorted({name for row in rows for name in row["peers"]}, key=lambda name: name.lower())
    body = [[f"softtopk {rows[0]['backend']}", *(f"{row['ms']:.3g}" for row in rows)]]
    for name in names:
        times = (row["peers"].get(name) for row in rows)
        body.append([name, *("" if ms is None else f"{ms:.3g}" for ms in times)])
    return markdown([f"{op}, {dtype}, {run}, ms", *(f"{row['rows']}×{row['n']}" for row in rows)], body)


def all_peers(file: str, section: str) -> str:
    """`peers` of every pass and dtype of a section that has any."""
    cells = [cell for cell in bars.cells(device(Path(file))) if cell.section == section]
    found = (peers(file, section, *at) for at in dict.fromkeys((c.run, c.dtype, c.op) for c in cells))
    return "\n\n".join(table for table in found if table.count("\n") > 2)


def summary(file: str) -> str:
    """Per section: how many cells there are, and what became of them."""
    verdicts = bars.verdicts(device(Path(file)), load(file)["rows"])
    body = []
    for section in dict.fromkeys(cell.section for cell, _, _ in verdicts):
        of_section = [(row, reason) for cell, row, reason in verdicts if cell.section == section]
        absent = sum(row is None for row, _ in of_section)
        met = sum(reason is None for _, reason in of_section)
        commits = sorted({row["commit"] for row, _ in of_section if row})
        numbers = (len(of_section), met, len(of_section) - met - absent, absent)
        body.append([section, *map(str, numbers), ", ".join(commits)])
    return markdown(["section", "cells", "met", "missed", "not measured", "at commit"], body)


def notes(file: str) -> str:
    """What the notes say of cells below their bar, each once."""
    found: dict[str, list[str]] = {}
    for row in load(file)["rows"]:
        if "note" in row:
            where = f"{row['op']} {row['pass']} {row['backend']} {row['dtype']} n={row['n']} k={row['k']}"
            alpha = "" if row["alpha"] is None else f" alpha={row['alpha']:g}"
            found.setdefault(row["note"], []).append(f"{where}{alpha} {row['distribution']}")
    return "\n".join(f"- {', '.join(cells)}: {note}" for note, cells in found.items())


def peer_versions(data: dict) -> str:
    return "; ".join(f"{name} {version}" for name, version in data.get("peers", {}).items())


def everything() -> str:
    """All of benchmarks/README.md that comes from the result files."""
    parts = []
    for path in files():
        data = json.loads(path.read_text())
        machine = data["environment"].get("gpu") or data["environment"]["processor"]
        parts += [f"## {machine}", f"{caption(data['environment'])}.", summary(path.name)]
        if versions := peer_versions(data):
            parts.append(f"Peers: {versions}.")
        verdicts = bars.verdicts(device(path), data["rows"], record=True)
        for section, title in TITLES.items():
            of_section = [v for v in verdicts if v[0].section == section]
            if not any(row for _, row, _ in of_section):
                continue
            parts += [f"### {title}", grid(of_section)]
            if beside := all_peers(path.name, section):
                parts.append(beside)
        for picture, title in plots.pictures(path, data["rows"]).items():
            parts += [f"### {title}", f"![{title}](results/{picture.name})"]
        if found := notes(path.name):
            parts += ["### Below the bar", found]
        profile = path.with_name(f"{path.stem}-profile.txt")
        if profile.exists():
            parts.append(
                f"What the profiler says of the headline shapes: [{profile.name}](results/{profile.name})."
            )
    return "\n\n".join(parts)


TABLES = {
    "speed": everything,
    "speed-fractions": lambda: fractions("soft_topk-h200.json"),
    "speed-peers": lambda: peers("soft_topk-h200.json", "headline", "forward", "float32"),
    "speed-peers-bfloat16": lambda: peers("soft_topk-h200.json", "headline", "forward", "bfloat16"),
    "speed-cpu": lambda: "\n\n".join(
        [
            peers("soft_topk-cpu.json", "cpu", "forward", "float32"),
            peers("soft_topk-cpu.json", "cpu", "forward+backward", "float32"),
            f"{caption(load('soft_topk-cpu.json')['environment'])}. {count('soft_topk-cpu.json')}",
        ]
    ),
}
