"""A sweep's results: sweep.json, frontier.png and summary.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from softsae.report import markdown, plots
from softsae.runs import write_json, write_text

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("learning rate", "lr", lambda v: f"{v:.3g}"),
    ("explained variance", "explained_variance", lambda v: f"{v:.4f}"),
    ("L0", "l0_mean", lambda v: f"{v:.2f}"),
    ("sd of L0", "l0_sd", lambda v: f"{v:.2f}"),
    ("cross-entropy recovered", "recovered", lambda v: f"{v:.4f}"),
    ("all positions replaced", "recovered_all_replaced", lambda v: f"{v:.4f}"),
    ("dead", "dead_latents", str),
    ("seconds", "seconds", lambda v: f"{v:.1f}"),
    ("samples per second", "samples_per_second", lambda v: f"{v:,.0f}"),
)


def write_sweep(out: Path, about: dict, rows: Sequence[dict]) -> Path:
    """Writes sweep.json, frontier.png and summary.md to the folder of a sweep; returns summary.md.

    Args:
        about: activations, target, part, samples and cross_entropy (CrossEntropy.as_dict, or None).
        rows: see sweep_command.py.
    """
    write_json(out / "sweep.json", {**about, "rows": rows})
    plots.frontier(out / "frontier.png", rows)
    sections = [
        f"# {out.name}",
        opening(about, rows),
        "![explained variance against L0](frontier.png)",
        table(rows),
        notes(about, rows),
        "Everything about each autoencoder is in `sweep.json`, its run folder in `autoencoders/NAME`"
        " (`softsae info`, `softsae eval`, `softsae.load` with its `sae/`).",
    ]
    write_text(out / "summary.md", "\n\n".join(section for section in sections if section) + "\n")
    return out / "summary.md"


def opening(about: dict, rows: Sequence[dict]) -> str:
    trained = [row for row in rows if "error" in row]
    train, d = trained[0]["config"]["train"], trained[0]["d"]
    sizes = ", ".join(str(n) for n in sorted({row["n"] for row in trained}))
    to = f" to {about['target']}" if about.get("target") else ""
    return (
        f"{len(trained)} autoencoders with d = {d} and n = {sizes}, trained on the same"
        f" {train['steps']} batches of {train['batch_size']}, seed {train['seed']}. Below: on"
        f" {about['samples']:,} {about['part']} activations ({about['activations']}{to})."
    )


def table(rows: Sequence[dict]) -> str:
    """A line for each autoencoder that was not left out, the best learning rate of several marked."""
    shown = [row for row in rows if not row.get("error")]
    searched = {row["group"] for row in shown if sum(r["group"] == row["group"] for r in shown) > 1}
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in shown)]
    body = []
    for row in shown:
        name = f"**{row['name']}**" if row["best"] and row["group"] in searched else row["name"]
        cells = ("" if row.get(key) is None else show(row[key]) for _, key, show in columns)
        body.append([name, *cells])
    said = "The learning rate that explains most variance is in bold.\n\n" if searched else ""
    return said + markdown.table(["", *(title for title, _, _ in columns)], body)


def notes(about: dict, rows: Sequence[dict]) -> str:
    said = [
        "Seconds are those of an autoencoder's own steps (on a GPU between events on its queue), without"
        " reading, logging and evaluating; dead latents are those that none of these activations makes"
        " active; `untrained` is a TopK as training would start. What is far below most others is out of the"
        " picture.",
    ]
    if ce := about["cross_entropy"]:
        said.append(
            f"Cross-entropy of {ce['tokens']:,} tokens, {ce['clean']:.4f} clean and"
            f" {ce['untouched']['zero']:.4f} with zeros in place of the residual stream; {ce['excluded']}"
            " excluded positions are untouched, or replaced like all others."
        )
    if left_out := [f"- {row['name']}: {row['error']}" for row in rows if row.get("error")]:
        said.append("Left out, since it failed:\n\n" + "\n".join(left_out))
    return "\n\n".join(said)
