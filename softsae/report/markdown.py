"""Tables and the summary of a run in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from softsae.cross_entropy import CrossEntropy

EVALUATION_ROWS = (
    ("explained variance", lambda m: f"{m['explained_variance']:.4f}"),
    ("mean squared error", lambda m: f"{m['mean_squared_error']:.4g}"),
    ("cosine", lambda m: f"{m['cosine']:.4f}"),
    ("relative reconstruction bias", lambda m: f"{m['relative_reconstruction_bias']:.4f}"),
    ("L0: mean", lambda m: f"{m['l0']['mean']:.2f}"),
    ("L0: standard deviation", lambda m: f"{m['l0']['sd']:.2f}"),
    ("L0: 5% … 95%", lambda m: f"{m['l0']['quantiles']['0.05']:.0f} … {m['l0']['quantiles']['0.95']:.0f}"),
    ("dead latents", lambda m: f"{m['dead_latents']}"),
    ("dense latents (> 10% of the tokens)", lambda m: f"{m['dense_latents']}"),
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""

    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def evaluation_table(evaluations: Mapping[str, dict]) -> str:
    """One column per autoencoder of what `softsae.metrics.evaluate` returned."""
    rows = [[label, *(show(m) for m in evaluations.values())] for label, show in EVALUATION_ROWS]
    return table(["on held-out activations", *evaluations], rows)


def cross_entropy_table(result: CrossEntropy) -> str:
    """Cross-entropy and recovered share with excluded positions untouched and replaced."""
    rows = [["clean", f"{result.clean:.4f}", "1", f"{result.clean:.4f}", "1"]]
    for name in result.untouched:
        cells = []
        for treatment, runs in (("untouched", result.untouched), ("replaced", result.replaced)):
            share = "0" if name == "zero" else f"{result.recovered(name, treatment):.4f}"
            cells += [f"{runs[name]:.4f}", share]
        rows.append(["zero-ablated" if name == "zero" else name, *cells])
    heading = ["cross-entropy (nats per token)", "excluded untouched", "recovered",
               "excluded replaced", "recovered"]  # fmt: skip
    return table(heading, rows)


def code(text: str) -> str:
    """A token or a passage as inline code on one line; a space at either end is shown as ·."""
    shown = text.replace("\r", "").replace("\n", "⏎").replace("`", "ˋ")
    left, right = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    if left == len(shown):
        return f"`{'·' * left}`" if shown else "(nothing)"
    return f"`{'·' * left}{shown.strip(' ')}{'·' * right}`"


def images(folder: Path, plots: Sequence[Path]) -> str:
    return "\n\n".join(f"![{plot.stem.replace('_', ' ')}]({plot.relative_to(folder)})" for plot in plots)
