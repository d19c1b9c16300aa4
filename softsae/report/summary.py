"""summary.md of a training run: what was trained, how it went, what it does on held-out data."""

from __future__ import annotations

from pathlib import Path

from softsae.cross_entropy import CrossEntropy
from softsae.report import markdown, plots
from softsae.runs import read_json, read_metrics, write_text


def write_run_summary(run: Path) -> Path:
    """Draws the plots of a run folder and writes its summary.md; returns that file.

    Reads config.json, metrics.jsonl and, where there is one, evaluation.json.
    """
    records = read_metrics(run)
    config = read_json(run / "config.json")
    model, train = config["autoencoder"], config["train"]
    drawn = [plots.training_curves(run / "plots" / "training.png", {model["architecture"]: records})]
    lines = [
        f"# {run.name}",
        "",
        f"{model['architecture']}, d = {model['d']}{to_target(model)}, n = {model['n']}, k = {model['k']:g};"
        f" {train['steps']} steps of {train['batch_size']} at learning rate {train['lr']:.3g},"
        f" mode {train['mode']}, seed {train['seed']}.",
        "",
    ]
    steps = [r for r in records if "event" not in r]
    if steps:
        last = steps[-1]
        lines += [
            f"Last batch (step {last['step']}): loss {last['loss']:.4g}, explained variance"
            f" {last['explained_variance']:.4f}, mean L0 {last['l0']:.2f},"
            f" {last['dead_latents']:.0f} dead latents.",
            "",
        ]
    file = run / "evaluation.json"
    if file.is_file():
        found = read_json(file)
        metrics = {run.name: found["metrics"]}
        to = f" to {found['target']}" if found.get("target") else ""
        lines += [f"On {found['part']} activations ({found['activations']}{to}):", ""]
        lines += [markdown.evaluation_table(metrics), ""]
        histogram = {run.name: found["metrics"]["l0"]["histogram"]}
        drawn.append(plots.l0_histogram(run / "plots" / "l0.png", histogram))
        if "cross_entropy" in found:
            values = {k: v for k, v in found["cross_entropy"].items() if k != "recovered"}
            lines += [markdown.cross_entropy_table(CrossEntropy(**values)), ""]
    lines += [markdown.images(run, drawn), ""]
    write_text(run / "summary.md", "\n".join(lines))
    return run / "summary.md"


def to_target(model: dict) -> str:
    """What is reconstructed, where that is not the input."""
    return f" to d_out = {model['d_out']} (a transcoder)" if model.get("d_out") else ""
