"""Result files of the speed table: read, merged cell by cell, annotated and written.

A cell that is measured again replaces its row; a section that is measured whole also loses the rows of
cells that it no longer has. Rows keep the commit that they were measured at, and the times of peers that
were not timed again. notes.json says of cells below their bar what was tried and what limits them:
[{"cell": {"op": ..., "n": ...}, "note": "..."}], for every row with those fields.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import bars
from benchmarks.environment import ROOT, commit, environment, write

NOTES = ROOT / "benchmarks" / "notes.json"


def load(path: Path) -> dict:
    """{"environment", "peers", "rows"} of a file, or the same without anything in it."""
    if path.exists():
        return json.loads(path.read_text())
    return {"environment": {}, "peers": {}, "rows": []}


def merge(old: list[dict], new: list[dict], whole: set[str], commit: str) -> list[dict]:
    """The rows of both, those of `new` at this commit; `whole` names the sections measured in full."""
    before = {bars.key(row): row for row in old}
    merged = {k: row for k, row in before.items() if row["section"] not in whole}
    for row in new:
        earlier = before.get(bars.key(row), {}).get("peers", {})
        merged[bars.key(row)] = {**row, "peers": earlier | row["peers"], "commit": commit}
    return sorted(merged.values(), key=order)


def order(row: dict) -> tuple:
    names = ("section", "dtype", "op", "pass", "backend", "distribution", "k")
    return (*(row[name] for name in names), -(row["alpha"] or 0), row["n"], row["rows"])


def annotate(device: str, rows: list[dict], notes: list[dict]) -> list[dict]:
    """The rows with a note where they miss their bar and notes.json has one, without one elsewhere."""
    missed = {bars.key(row) for _, row, reason in bars.verdicts(device, rows) if row and reason}
    annotated = []
    for row in rows:
        row = {name: value for name, value in row.items() if name != "note"}
        if bars.key(row) in missed:
            fitting = [n["note"] for n in notes if n["cell"].items() <= row.items()]
            row |= {"note": " ".join(fitting)} if fitting else {}
        annotated.append(row)
    return annotated


def update(
    path: Path,
    device: str,
    new: list[dict],
    whole: set[str],
    peers: dict[str, str],
    remark: str | None = None,
) -> list[dict]:
    """Merge what was measured into a file, and return all of its rows. `remark` goes to the environment."""
    old = load(path)
    rows = merge(old["rows"], new, whole, commit())
    rows = annotate(device, rows, json.loads(NOTES.read_text()))
    known = {name: text for name, text in old.get("peers", {}).items() if name not in peers}
    machine = environment() if new else old["environment"]  # only the notes are new
    if remark:
        machine = {**machine, "remark": remark}
    write(path, rows, environment=machine, peers=known | peers)
    return rows
