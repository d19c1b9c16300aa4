"""The plots of a run, as PNG files. Drawn without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f5fa8", "#d1702a", "#8a8a8a"
COLORS = (BLUE, ORANGE, GREY)


def training_curves(file: Path, runs: Mapping[str, Sequence[dict]]) -> Path:
    """Reconstruction loss, explained variance, mean L0 and dead latents against the step.

    runs: name -> lines of metrics.jsonl; lines of evaluations are left out.
    """
    figure, axes = new_figure(2, 2, size=(10, 6.5))
    fields = (
        ("loss_reconstruction", "reconstruction loss"),
        ("explained_variance", "explained variance (batch)"),
        ("l0", "mean L0 (batch)"),
        ("dead_latents", "dead latents"),
    )
    for axis, (name, label) in zip(axes.flat, fields, strict=True):
        for (run, records), color in zip(runs.items(), COLORS, strict=False):
            points = [(r["step"], r[name]) for r in records if name in r and "event" not in r]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, label=run)
        axis.set(xlabel="step", ylabel=label)
    axes[0, 0].set_yscale("log")
    axes[0, 1].set_ylim(bottom=max(0.0, axes[0, 1].get_ylim()[0]), top=1)
    axes[0, 0].legend(frameon=False)
    return save(figure, file)


def budget_distribution(file: Path, k_hat: np.ndarray, target: float) -> Path:
    """Histogram of k_hat (tokens,) with its mean and the target."""
    figure, axis = new_figure(1, 1, size=(6, 4))
    draw_k_hat(axis, k_hat, target)
    return save(figure, file)


def l0_histogram(file: Path, l0: Mapping[str, Mapping[str, int]]) -> Path:
    """Share of samples by number of active latents; l0: name -> {"value": count} of each autoencoder."""
    figure, axis = new_figure(1, 1, size=(6, 4))
    for (name, histogram), color in zip(l0.items(), COLORS, strict=False):
        values = np.array([int(value) for value in histogram])
        shares = np.array(list(histogram.values())) / sum(histogram.values())
        axis.bar(values, shares, width=1.0, color=color, alpha=0.6, label=name)
    axis.set(xlabel="active latents (L0)", ylabel="share of tokens")
    axis.legend(frameon=False)
    return save(figure, file)


def budget_by_token(file: Path, rows: Sequence[tuple[str, float, float, int]]) -> Path:
    """Mean k_hat of single tokens, largest on top; rows of (token, mean, sd, count)."""
    figure, axis = new_figure(1, 1, size=(6, 0.24 * len(rows) + 1.2))
    draw_tokens(axis, rows)
    return save(figure, file)


def budget_against_error(file: Path, k_hat: np.ndarray, norms: np.ndarray, error: np.ndarray) -> Path:
    """k_hat against the token's norm and against its share of variance that is not reconstructed."""
    figure, (left, right) = new_figure(1, 2, size=(10, 4))
    style = {"s": 3, "alpha": 0.25, "color": BLUE, "linewidths": 0, "rasterized": True}
    left.scatter(norms, k_hat, **style)
    left.set(xlabel="norm of the activation", ylabel="$\\hat k$", xscale="log")
    right.scatter(error, k_hat, **style)
    right.set(xlabel="squared error of the reconstruction / mean", ylabel="$\\hat k$", xscale="log")
    return save(figure, file)


def headline(
    file: Path,
    title: str,
    k_hat: np.ndarray,
    target: float,
    tokens: Sequence[tuple[str, float, float, int]],
    passage: Sequence[tuple[str, float | None]],
) -> Path:
    """One picture of the demo: a passage coloured by k_hat, its distribution, tokens at both ends.

    passage: (token text, k_hat) in order; None for an excluded position.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1.6), width_ratios=(1, 1.25))
    draw_passage(figure.add_subplot(grid[0, :]), passage, k_hat)
    draw_k_hat(style_axis(figure.add_subplot(grid[1, 0])), k_hat, target)
    draw_tokens(style_axis(figure.add_subplot(grid[1, 1])), tokens)
    figure.suptitle(title, fontsize=12)
    return save(figure, file)


def frontier(file: Path, rows: Sequence[dict]) -> Path:
    """Explained variance and, where measured, cross-entropy recovered against the mean L0.

    rows: variant, l0_mean, explained_variance, recovered (or None) and best of every autoencoder. One
    line for each variant through the best of its learning rates, the others as faint points. What is far
    below most of them is out of the picture.
    """
    fields = [("explained_variance", "explained variance"), ("recovered", "cross-entropy recovered")]
    fields = [f for f in fields if any(row.get(f[0]) is not None for row in rows)]
    figure, axes = new_figure(1, len(fields), size=(5.2 * len(fields) + 2.2, 4.6))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for axis, (name, label) in zip(np.atleast_1d(axes), fields, strict=True):
        for variant, style in zip(variants, line_styles(variants), strict=True):
            points = [r for r in rows if r["variant"] == variant and is_drawn(r, name)]
            best = sorted((r["l0_mean"], r[name]) for r in points if r["best"])
            rest = [(r["l0_mean"], r[name]) for r in points if not r["best"]]
            axis.plot(*zip(*best, strict=True) if best else ([], []), **style, markersize=5, label=variant)
            if rest:
                axis.scatter(*zip(*rest, strict=True), color=style["color"], alpha=0.3, s=14, linewidths=0)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(xlabel="active latents (mean L0)", ylabel=label)
        show_most(axis, [(r["l0_mean"], r[name]) for r in rows if is_drawn(r, name) and is_trained(r)])
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return save(figure, file)


def show_most(axis, points: Sequence[tuple[float, float]]) -> None:
    """Limits around the points (x, y) whose y is at most twice as far below the median as the largest y is
    above it: one that was never trained or has collapsed would squeeze all others together."""
    if len({y for _, y in points}) < 3:
        return
    ys = [y for _, y in points]
    lowest = np.median(ys) - 2 * (max(ys) - np.median(ys))
    xs, ys = zip(*((x, y) for x, y in points if y >= lowest), strict=True)
    margin = 0.05 * (max(ys) - min(ys))
    axis.set(xlim=(min(xs) / 1.2, max(xs) * 1.2), ylim=(min(ys) - margin, max(ys) + margin))


def is_trained(row: dict) -> bool:
    return row["variant"] != "untrained"


def is_drawn(row: dict, name: str) -> bool:
    """Whether a row has a finite value and a place on the logarithmic axis."""
    value = row.get(name)
    return value is not None and np.isfinite(value) and row["l0_mean"] > 0


def line_styles(variants: Sequence[str]) -> list[dict]:
    """A colour and a marker for each; the untrained control is grey and dashed."""
    from matplotlib import colormaps

    colors, markers = [*colormaps["tab10"].colors, "black"], "osD^vPX<>*"
    del colors[7]  # grey, which the control has
    styles = [{"color": colors[i % 10], "marker": markers[i % 10]} for i in range(len(variants))]
    control = {"color": GREY, "marker": ".", "linestyle": "--"}
    return [control if v == "untrained" else style for v, style in zip(variants, styles, strict=True)]


def draw_k_hat(axis, k_hat: np.ndarray, target: float) -> None:
    axis.hist(k_hat, bins=60, color=BLUE)
    axis.axvline(k_hat.mean(), color=ORANGE, label=f"mean {k_hat.mean():.1f}, sd {k_hat.std():.1f}")
    axis.axvline(target, color=GREY, linestyle="--", label=f"target {target:g}")
    axis.set(xlabel="budget $\\hat k$ of a token", ylabel="tokens")
    axis.legend(frameon=False)


def draw_tokens(axis, rows: Sequence[tuple[str, float, float, int]]) -> None:
    ordered = sorted(rows, key=lambda row: row[1])
    places = np.arange(len(ordered))
    means = [row[1] for row in ordered]
    colors = [ORANGE if place >= len(ordered) / 2 else BLUE for place in places]
    axis.errorbar(means, places, xerr=[row[2] for row in ordered], fmt="none", ecolor="#cccccc", zorder=1)
    axis.scatter(means, places, c=colors, s=18, zorder=2)
    labels = [f"{plain_text(row[0])}  ×{row[3]}" for row in ordered]
    axis.set_yticks(places, labels, fontsize=8, family="monospace")
    axis.set(xlabel="mean $\\hat k$ of a token ± sd over its occurrences")


def draw_passage(axis, passage: Sequence[tuple[str, float | None]], k_hat: np.ndarray) -> None:
    """Tokens from left to right, line by line, each on a ground coloured by its k_hat."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = Normalize(*np.quantile(k_hat, (0.02, 0.98)))
    colors = colormaps["viridis"]
    columns, lines = 110, 7
    axis.set(xlim=(0, columns), ylim=(lines, 0))
    axis.axis("off")
    column = line = 0
    for text, budget in passage:
        text = plain_text(text)
        if column + len(text) > columns:
            column, line = 0, line + 1
        if line >= lines:
            break
        ground = "#eeeeee" if budget is None else colors(scale(budget))
        dark = budget is not None and scale(budget) < 0.6
        axis.add_patch(_box(column, line, len(text), ground))
        axis.text(column + len(text) / 2, line + 0.5, text, ha="center", va="center", family="monospace",
                  fontsize=8.5, color="white" if dark else "black", parse_math=False)  # fmt: skip
        column += len(text)
    bar = axis.figure.colorbar(ScalarMappable(scale, colors), ax=axis, pad=0.01, aspect=12)
    bar.set_label("$\\hat k$")


def _box(column: int, line: int, width: int, color):
    from matplotlib.patches import Rectangle

    return Rectangle((column, line + 0.06), width, 0.88, facecolor=color, edgecolor="white", linewidth=0.8)


def plain_text(token: str) -> str:
    """A token as one line that every font can draw: spaces as ␣-like dots, line ends as \\n."""
    text = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·")
    return "".join(c if c.isprintable() and ord(c) < 0x2000 else "?" for c in text).replace("$", r"\$")


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    for axis in np.atleast_1d(axes).flat:
        style_axis(axis)
    return figure, axes


def style_axis(axis):
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    return axis


def save(figure: Figure, file: Path) -> Path:
    """Written under a temporary name, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file
