"""The demo's report: summary.md, results.json, the plots and the headline picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softsae.activations.shards import ShardSource
from softsae.cross_entropy import CrossEntropy
from softsae.report import markdown, plots
from softsae.report.tokens import (
    Shown,
    TokenStatistics,
    by_token,
    passage,
    ranks_correlate,
    telling_latents,
)
from softsae.runs import read_metrics, write_json, write_text

LATENTS, TOKENS, CONTEXTS = 6, 12, 6  # how many latents, tokens and examples are shown


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured. Autoencoders are SoftSAE, TopK and untrained."""

    model: str
    manifest: dict
    heldout_rows: int
    sizes: dict
    k: float
    topk_k: float
    estimator: str
    device: str
    evaluations: dict[str, dict]
    cross_entropy: CrossEntropy
    statistics: TokenStatistics
    held: ShardSource
    shown: Shown


def write_report(out: Path, result: DemoResult, drawn: list[Path], seconds: dict[str, float]) -> Path:
    """Writes results.json and summary.md to the run folder; returns summary.md."""
    write_json(out / "results.json", as_json(result, seconds))
    sections = [
        opening(result),
        "![budgets of tokens](headline.png)",
        comparison(result),
        budgets(result),
        latents(result),
        "## Plots\n\n" + markdown.images(out, drawn),
        whereabouts(out, seconds),
    ]
    write_text(out / "summary.md", "\n\n".join(sections) + "\n")
    return out / "summary.md"


def frequent_tokens(result: DemoResult) -> tuple[list[tuple[int, float, float, int]], int]:
    """`by_token` of k_hat, and the number of occurrences that was asked for."""
    least = max(2, min(10, result.heldout_rows // 1000))
    return by_token(result.statistics.k_hat, result.held.token_ids, least), least


def draw(out: Path, result: DemoResult) -> list[Path]:
    """Draws headline.png and the plots; returns the plots."""
    statistics, folder = result.statistics, out / "plots"
    tokens, _ = frequent_tokens(result)
    curves = {"SoftSAE": read_metrics(out / "softsae"), "TopK": read_metrics(out / "topk")}
    histograms = {name: result.evaluations[name]["l0"]["histogram"] for name in ("SoftSAE", "TopK")}
    ends = named(result, tokens[:TOKENS] + tokens[-TOKENS:] if len(tokens) > 2 * TOKENS else tokens)
    plots.headline(
        out / "headline.png",
        f"SoftSAE gives every token its own budget: {result.model}, layer {result.manifest['layer']},"
        " held-out text",
        statistics.k_hat,
        result.k,
        ends,
        passage(result.held, statistics.k_hat, result.shown, widest(result)),
    )
    return [
        plots.training_curves(folder / "training.png", curves),
        plots.budget_distribution(folder / "k_hat.png", statistics.k_hat, result.k),
        plots.l0_histogram(folder / "l0.png", histograms),
        plots.budget_by_token(folder / "k_hat_by_token.png", ends),
        plots.budget_against_error(
            folder / "k_hat_and_error.png", statistics.k_hat, statistics.norm, statistics.error
        ),
    ]


def opening(result: DemoResult) -> str:
    about, sizes = result.manifest, result.sizes
    return (
        f"# SoftSAE on {result.model}, {about['hook_point']}\n\n"
        f"Two sparse autoencoders with d = {about['d']} and n = {sizes['n']} latents, trained for"
        f" {sizes['steps']} steps of {sizes['batch_size']} on {about['rows']:,} activations: SoftSAE with a"
        f" target of {result.k:g} active latents per token ({result.estimator} estimator), and TopK with"
        f" k = {result.topk_k:g}, the mean that SoftSAE arrived at. Everything below is measured on"
        f" {result.heldout_rows:,} activations of held-out text. {about['excluded']['positions']} training"
        f" positions were excluded (norm above {limit(about)}). Device: {result.device}."
    )


def limit(manifest: dict) -> str:
    most, factor = manifest["excluded"]["max_norm"], manifest["excluded"]["outlier_factor"]
    return "no limit" if most is None else f"{most:.0f}, {factor:g} times the median"


def comparison(result: DemoResult) -> str:
    ce = result.cross_entropy
    return "\n\n".join(
        [
            "## Reconstruction",
            markdown.evaluation_table(result.evaluations),
            "## Cross-entropy with the reconstruction in place of the residual stream",
            markdown.cross_entropy_table(ce),
            f"{ce.tokens:,} held-out tokens, {ce.excluded} excluded positions. Recovered ="
            " (CE_zero − CE_sae)/(CE_zero − CE_clean). Excluded positions are left as they are in all runs"
            " (untouched), or replaced and ablated like all others.",
        ]
    )


def budgets(result: DemoResult) -> str:
    statistics = result.statistics
    tokens, least = frequent_tokens(result)
    q = np.quantile(statistics.k_hat, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))
    spread = markdown.table(
        ["budget k̂", "mean", "sd", "min", "5%", "25%", "50%", "75%", "95%", "max"],
        [["", f"{statistics.k_hat.mean():.2f}", f"{statistics.k_hat.std():.2f}", *(f"{v:.1f}" for v in q)]],
    )
    correlations = (
        f"Rank correlation of k̂ with the norm of the activation:"
        f" {ranks_correlate(statistics.k_hat, statistics.norm):.2f}; with the squared error that is left:"
        f" {ranks_correlate(statistics.k_hat, statistics.error):.2f}."
    )
    order = np.argsort(statistics.k_hat, kind="stable")
    return "\n\n".join(
        [
            "## How the budget k̂ varies",
            spread,
            correlations,
            f"Tokens with the smallest and the largest mean k̂ (at least {least} occurrences):",
            token_table(result, tokens),
            "Single tokens, each in its text, with the smallest k̂:",
            examples(result, order),
            "and with the largest:",
            examples(result, order[::-1]),
        ]
    )


def token_table(result: DemoResult, tokens: list) -> str:
    def cells(entry):
        text, mean, sd, count = entry
        return [markdown.code(text), f"{mean:.1f} ± {sd:.1f}", str(count)]

    count = min(TOKENS, len(tokens) // 2)
    smallest, largest = named(result, tokens[:count]), named(result, tokens[::-1][:count])
    rows = [cells(a) + cells(b) for a, b in zip(smallest, largest, strict=True)]
    return markdown.table(["smallest", "k̂", "count", "largest", "k̂", "count"], rows)


def examples(result: DemoResult, order: np.ndarray) -> str:
    """The first rows of an order, no token twice, with their k̂ and text."""
    seen, lines = set(), []
    for row in order:
        token = int(result.held.token_ids[row])
        if token in seen:
            continue
        seen.add(token)
        lines.append(f"- {result.statistics.k_hat[row]:.1f}: {in_text(result, row)}")
        if len(lines) == CONTEXTS:
            break
    return "\n".join(lines)


def latents(result: DemoResult) -> str:
    statistics = result.statistics
    chosen = telling_latents(statistics, LATENTS)
    parts = [
        "## A few latents",
        "Those with the largest mean square among the latents active in 0.05% to 2% of the tokens, each"
        " with the tokens that activate it most.",
    ]
    for latent in chosen:
        rows, values = statistics.top_rows[:, latent], statistics.top_values[:, latent]
        lines = [f"- {value:.2f}: {in_text(result, row)}" for row, value in zip(rows, values, strict=True)
                 if value > 0]  # fmt: skip
        parts.append(f"**Latent {latent}**, active in {statistics.frequency[latent]:.2%} of the tokens\n\n"
                     + "\n".join(lines[:CONTEXTS]))  # fmt: skip
    return "\n\n".join(parts)


def in_text(result: DemoResult, row: int) -> str:
    sequence, position = int(result.held.sequence[row]), int(result.held.position[row])
    where = result.shown.document(sequence)
    return f"{markdown.code(result.shown.context(sequence, position))} ({where})"


def named(result: DemoResult, tokens: list) -> list[tuple[str, float, float, int]]:
    return [(result.shown.token(token), *rest) for token, *rest in tokens]


def widest(result: DemoResult) -> int:
    """The sequence in which k̂ varies most, among those with at least half of the longest's length."""
    sequence = result.held.sequence
    counts = np.bincount(sequence)
    mean = np.bincount(sequence, result.statistics.k_hat) / counts.clip(1)
    square = np.bincount(sequence, (result.statistics.k_hat - mean[sequence]) ** 2) / counts.clip(1)
    return int(np.argmax(np.where(counts >= counts.max() / 2, square, -1)))


def whereabouts(out: Path, seconds: dict[str, float]) -> str:
    rows = [[stage, f"{time:.1f} s"] for stage, time in seconds.items()]
    rows.append(["together", f"{sum(seconds.values()):.1f} s"])
    places = (
        ("summary.md, results.json", "this report and its numbers"),
        ("headline.png, plots/", "the pictures"),
        ("softsae/, topk/", "the two runs: config.json, metrics.jsonl, checkpoint, sae/ for `softsae.load`"),
        ("activations/train, activations/heldout", "the activations, to train on with `softsae train`"),
        ("config.yaml, timings.json", "the options and the times"),
    )
    return "\n\n".join(
        [
            "## Where everything lies, and how long it took",
            f"In `{out}`:",
            "\n".join(f"- `{place}`: {what}" for place, what in places),
            markdown.table(["stage", "time"], rows),
        ]
    )


def as_json(result: DemoResult, seconds: dict[str, float]) -> dict:
    statistics = result.statistics
    return {
        "model": result.model,
        "revision": result.manifest["revision"],
        "hook_point": result.manifest["hook_point"],
        "device": result.device,
        "sizes": result.sizes,
        "k": result.k,
        "topk_k": result.topk_k,
        "estimator": result.estimator,
        "training_activations": result.manifest["rows"],
        "heldout_activations": result.heldout_rows,
        "evaluations": result.evaluations,
        "cross_entropy": result.cross_entropy.as_dict(),
        "k_hat": {"mean": float(statistics.k_hat.mean()), "sd": float(statistics.k_hat.std())},
        "seconds": seconds,
    }
