"""The selection's cost against n, and where the time of a training step goes, from the result files.

As in plots.py a picture carries a digest of the numbers that it shows.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter
from PIL import Image

from benchmarks.environment import RESULTS
from benchmarks.plots import digest
from benchmarks.sparse_bars import STEP_SHAPES
from benchmarks.step_stages import STAGES

LENGTHS, STEPS = "The selection's cost against n", "Where the time of a step goes"
KINDS = ("sparse", "step")
MARKS = ("o-", "s:", "^-.")  # of backends
SHORT = {
    "SoftSAE, wide estimator": "wide",
    "SoftSAE, bottleneck estimator": "narrow",
    "TopK": "TopK",
}
IDLE = "no kernel"
COLOURS = dict(zip([*STAGES, IDLE], [*plt.get_cmap("tab20").colors][: len(STAGES) + 1], strict=True))


def points(rows: list[dict]) -> list[dict]:
    """What the picture of a result file shows, sorted."""
    found = []
    for row in rows:
        if row.get("section") == "selection_n" and row["ms"] is not None:
            names = ("backend", "pass", "dtype", "n", "ms", "floor_ms")
        elif "stages" in row:
            names = ("trainer", "path", "rows", "d", "n", "k", "ms", "stages", "idle_ms", "floor_parts")
        else:
            continue
        found.append({name: row[name] for name in names})
    return sorted(found, key=lambda point: json.dumps(point))


def pictures(file: Path, rows: list[dict]) -> dict[Path, str]:
    """The pictures of a result file, by path with their titles; none where there is nothing to show."""
    if not points(rows):
        return {}
    kind = file.stem.split("-")[0]
    if kind == "sparse":
        return {file.with_name(f"{file.stem}-n.png"): LENGTHS}
    return {file.with_name(f"{file.stem}-stages.png"): STEPS}


def files() -> list[Path]:
    return [path for kind in KINDS for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def stale() -> list[Path]:
    """The pictures of all result files that are missing or show other numbers."""
    found = []
    for file in files():
        rows = json.loads(file.read_text())["rows"]
        for path in pictures(file, rows):
            if not (path.exists() and Image.open(path).text.get("Digest") == digest(points(rows))):
                found.append(path)
    return found


def draw() -> None:
    """Write every picture that is stale."""
    wanted = stale()
    for file in files():
        rows = json.loads(file.read_text())["rows"]
        for path, title in pictures(file, rows).items():
            if path in wanted:
                shown = points(rows)
                figure = of_lengths(shown) if title == LENGTHS else of_stages(shown)
                figure.suptitle(title, fontsize=10)
                figure.savefig(path, dpi=130, metadata={"Digest": digest(shown)})
                plt.close(figure)


def of_lengths(shown: list[dict]):
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
    dtypes = {"bfloat16": "#08306b", "float32": "#b2182b"}
    marks = dict(zip(sorted({p["backend"] for p in shown}), MARKS, strict=False))
    for panel, run in zip(panels, ("forward", "backward"), strict=True):
        for (backend, mark), (dtype, colour) in itertools.product(marks.items(), dtypes.items()):
            name = (backend, run, dtype)
            line = sorted(
                (p for p in shown if (p["backend"], p["pass"], p["dtype"]) == name), key=lambda p: p["n"]
            )
            where = [p["n"] for p in line]
            style = {"color": colour, "ms": 3.5, "lw": 1.4}
            panel.plot(where, [p["ms"] for p in line], mark, label=f"{backend}, {dtype}", **style)
            if mark == MARKS[0]:
                panel.plot(where, [p["floor_ms"] for p in line], "--", label=f"{dtype}, floor", **style)
        panel.set(yscale="log", xlabel="row length n", title=run)
        panel.set_xscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right")
    return figure


def of_stages(shown: list[dict]):
    """A panel for each shape with a stacked bar for each trainer and path."""
    shapes = [s for s in STEP_SHAPES if any(shape_of(p) == s for p in shown)]
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(4 * len(shapes) + 2, 4.4), layout="constrained", squeeze=False
    )
    used = [stage for stage in COLOURS if any(stage in parts(p) for p in shown)]
    for panel, shape in zip(panels[0], shapes, strict=True):
        bars = sorted((p for p in shown if shape_of(p) == shape), key=lambda p: (p["trainer"], p["path"]))
        names = [f"{SHORT[p['trainer']]}\n{p['path']}" for p in bars]
        for place, point in enumerate(bars):
            height = 0.0
            for stage in used:
                part = parts(point).get(stage, 0.0)
                panel.bar(place, part, 0.75, bottom=height, color=COLOURS[stage], label=stage)
                height += part
            floor = sum(point["floor_parts"].values())
            panel.plot(
                [place - 0.4, place + 0.4], [floor] * 2, color="black", lw=1.6, label="estimated floor"
            )
        panel.set_xticks(range(len(bars)), names, fontsize=7)
        panel.set_title("B={}, d={},\nn={}, k={}".format(*shape), fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("ms")
    handles = {text: handle for handle, text in zip(*panels[0][0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside right")
    return figure


def shape_of(point: dict) -> tuple:
    return point["rows"], point["d"], point["n"], point["k"]


def parts(point: dict) -> dict[str, float]:
    """Milliseconds by stage, with those in which no kernel ran."""
    return {**point["stages"], IDLE: max(point["idle_ms"], 0.0)}
