"""The cost of soft_topk against the row length and against the number of rows, from the result files.

A picture carries a digest of the numbers that it shows, so that a stale one is known without drawing it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter
from PIL import Image

STYLE = 1  # to be raised when the drawing changes
SWEEPS = {
    "sweep_n": ("n", "row length n", "The cost against n, with the same bytes for every n"),
    "sweep_rows": ("rows", "rows", "The cost against the number of rows, n = 16384"),
}
COLOURS = {"cuda": "#08306b", "cpu": "#08306b", "triton": "#3182bd", "torch": "#b2182b"}


def points(rows: list[dict], section: str) -> list[dict]:
    """What a picture shows, sorted: one dict for each point."""
    names = ("op", "pass", "backend", "rows", "n", "ms", "floor_ms")
    found = [{name: row[name] for name in names} for row in rows if row["section"] == section]
    return sorted((p for p in found if p["ms"] is not None), key=lambda p: json.dumps(p))


def pictures(file: Path, rows: list[dict]) -> dict[Path, str]:
    """The pictures of a result file, by path with their titles; none for a sweep that was not measured."""
    return {
        file.with_name(f"{file.stem}-{axis}.png"): title
        for section, (axis, _, title) in SWEEPS.items()
        if points(rows, section)
    }


def digest(shown: list[dict]) -> str:
    return hashlib.sha256(json.dumps([STYLE, shown]).encode()).hexdigest()[:16]


def stale(file: Path, rows: list[dict]) -> list[Path]:
    """The pictures that are missing or show other numbers."""
    found = []
    for section, (axis, _, _) in SWEEPS.items():
        path, shown = file.with_name(f"{file.stem}-{axis}.png"), points(rows, section)
        if shown and not (path.exists() and Image.open(path).text.get("Digest") == digest(shown)):
            found.append(path)
    return found


def draw(file: Path, rows: list[dict]) -> None:
    """Write every picture that is stale."""
    for path in stale(file, rows):
        section = next(s for s, (axis, _, _) in SWEEPS.items() if path.stem.endswith(f"-{axis}"))
        draw_one(path, section, points(rows, section))


def draw_one(path: Path, section: str, shown: list[dict]) -> None:
    axis, label, title = SWEEPS[section]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
    for panel, run in zip(panels, ("forward", "backward"), strict=True):
        of_run = [p for p in shown if p["pass"] == run]
        for backend in dict.fromkeys(p["backend"] for p in of_run):
            line = sorted((p for p in of_run if p["backend"] == backend), key=lambda p: p[axis])
            name = "torch.topk" if backend == "torch" else f"soft_topk, {backend}"
            panel.plot(
                *([p[axis] for p in line], [p["ms"] for p in line]),
                *("o-",),
                **{"color": COLOURS.get(backend, "0.5"), "ms": 3.5, "lw": 1.4, "label": name},
            )
        # Every backend measured its own floor; one line, of the fastest copies.
        floor: dict[int, float] = {}
        for p in of_run:
            floor[p[axis]] = min(floor.get(p[axis], p["floor_ms"]), p["floor_ms"])
        where = sorted(floor)
        panel.plot(where, [floor[at] for at in where], "--", color="0.4", lw=1.2, label="floor")
        panel.set(yscale="log", xlabel=label, title=run)
        panel.set_xscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.spines[["top", "right"]].set_visible(False)
    times = [ms for p in shown for ms in (p["ms"], p["floor_ms"])]
    decades = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    panels[0].set(ylabel="ms", ylim=[10**decade for decade in decades])
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Digest": digest(shown)})
    plt.close(figure)
