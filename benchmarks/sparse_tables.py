"""The tables of the sparse path and of whole training steps, for benchmarks/README.md and README.md."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import sparse_bars, sparse_plots
from benchmarks.environment import RESULTS
from benchmarks.sparse_bars import DENSE_TOPK, SOFTSAE_REFERENCE, STEP_SHAPES, TOPK_REFERENCE, WIDE
from benchmarks.tables import caption, markdown

NOTHING = "Not measured yet."
STEP_FILE = "step-h200.json"
TITLES = {
    "selection": "From pre-activations to a code; the fraction is that of reading them once",
    "selection_n": "The selection's cost against n, with as many elements for every n",
    "decode": "Decoding",
    "backward": "The gradients of the decoder's weights and of a code's values, with its order by latent",
    "adam": "Adam on both weights of an autoencoder, with bfloat16 copies",
    "estimator": "The wide estimator, forward and backward; in brackets the largest memory of a call",
}
MARKS = {True: "", False: " ✗"}


def files(kind: str) -> list[Path]:
    return sorted(RESULTS.glob(f"{kind}-*.json"), reverse=True)


def machine(data: dict) -> str:
    return data["environment"].get("gpu") or data["environment"]["processor"]


def bars_table(bars: list[dict]) -> str:
    """Every bar, those that are missed marked."""
    met = sum(bar["met"] for bar in bars)
    body = [[bar["of"], bar["asked"], bar["found"] + MARKS[bar["met"]]] for bar in bars]
    return f"{met} of {len(bars)} bars are met.\n\n" + markdown(["", "bar", "found"], body)


def shape_of(row: dict) -> str:
    return f"{row['rows']}×{row['n']}" + (f"×{row['d']}" if row["d"] else "")


def selection_table(rows: list[dict]) -> str:
    """A column for each shape; below, what selects otherwise."""
    shapes = list(dict.fromkeys(shape_of(row) for row in sorted(rows, key=lambda row: row["n"])))
    lines: dict[tuple, dict[str, str]] = {}
    peers: dict[tuple, dict[str, str]] = {}
    for row in rows:
        name = (row["op"], row["pass"], row["backend"], row["dtype"])
        missed = MARKS[row.get("met", True)]
        text = "error ✗" if row["ms"] is None else f"{row['ms']:.3g} ({row['fraction']:.0%}){missed}"
        lines.setdefault(name, {})[shape_of(row)] = text
        for peer, ms in row["peers"].items():
            backend = row["backend"] if peer == DENSE_TOPK else ""
            peers.setdefault((peer, "forward", backend, row["dtype"]), {})[shape_of(row)] = f"{ms:.3g}"
    body = [[*name, *(found.get(s, "") for s in shapes)] for name, found in (lines | peers).items()]
    return markdown(["ms", "pass", "", "dtype", *shapes], body)


def peers_table(rows: list[dict]) -> str:
    """A line for each cell; peers in milliseconds and as multiples of our time."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    body = []
    for row in rows:
        cells = []
        for name in names:
            ms = row["peers"].get(name)
            cells.append("–" if ms is None else f"{ms:.3g} ({ms / row['ms']:.2f}×)")
        found = "error ✗" if row["ms"] is None else f"{row['ms']:.3g}{MARKS[row.get('met', True)]}"
        if row.get("peak_bytes"):
            found += f" [{row['peak_bytes'] / 2**20:.0f} MiB, autograd {row['peer_peak_bytes'] / 2**20:.0f}]"
        fraction = "" if row["fraction"] is None else f"{row['fraction']:.0%}"
        parts = f"{row['transposition_ms']:.3g} + {row['gradients_ms']:.3g}" if "gradients_ms" in row else ""
        what = f"{row['op']} {row['backend']}"
        body.append(
            [what, row["dtype"], shape_of(row), row["k"], row["latents"], found, parts, fraction, *cells]
        )
    header = ["ms", "dtype", "B×n×d", "k", "latents", "ours", "order + gradients", "of the floor", *names]
    used = [i for i in range(len(header)) if any(line[i] for line in body)]
    return markdown([header[i] for i in used], [[line[i] for i in used] for line in body])


def sparse() -> str:
    """All of the sparse path's kernels, by machine."""
    parts = []
    for path in files("sparse"):
        data = json.loads(path.read_text())
        parts += [f"### {machine(data)}", f"{caption(data['environment'])}."]
        if data["peers"]:
            parts.append(
                "Peers: " + "; ".join(f"{name} {text}" for name, text in data["peers"].items()) + "."
            )
        for section, title in TITLES.items():
            rows = [row for row in data["rows"] if row["section"] == section]
            if rows:
                table = selection_table if section.startswith("selection") else peers_table
                parts += [f"#### {title}", table(rows)]
        for picture, title in sparse_plots.pictures(path, data["rows"]).items():
            parts.append(f"![{title}](results/{picture.name})")
        if data["bars"]:
            parts += ["#### Bars", bars_table(data["bars"])]
    return "\n\n".join(parts) or NOTHING


def step_table(rows: list[dict], shape: tuple) -> str:
    """Ours, then the peers."""
    of_shape = [row for row in rows if (row["rows"], row["d"], row["n"], row["k"]) == tuple(shape)]
    peers = list(dict.fromkeys(name for row in of_shape for name in row.get("peers", {})))
    body = []
    for row in of_shape:
        name = [row["trainer"], row["path"], row["precision"]]
        if row["ms"] is None:
            body.append([*name, row["error"], *[""] * (3 + len(peers))])
            continue
        memory = (row.get(field) for field in ("peak_bytes", "beyond_bytes"))
        body.append(
            [
                *name,
                f"{row['ms']:.3g}",
                f"{row['fraction']:.0%}" if "fraction" in row else "",
                *("" if size is None else f"{size / 2**20:,.0f}" for size in memory),
                *(f"{row['peers'][p]:.3g}×" if p in row.get("peers", {}) else "" for p in peers),
            ]
        )
    header = ["", "path", "products", "ms", "of the floor", "peak MiB", "beyond the state"]
    return markdown([*header, *(f"{p} takes" for p in peers)], body)


def step() -> str:
    """Whole training steps, by machine and shape."""
    parts = []
    for path in files("step"):
        data = json.loads(path.read_text())
        parts += [f"### {machine(data)}", f"{caption(data['environment'])}."]
        if data["peers"]:
            parts.append(
                "Peers: " + "; ".join(f"{name} {text}" for name, text in data["peers"].items()) + "."
            )
        for shape in STEP_SHAPES:
            parts += ["#### B = {}, d = {}, n = {}, k = {}".format(*shape), step_table(data["rows"], shape)]
        for picture, title in sparse_plots.pictures(path, data["rows"]).items():
            parts += [f"#### {title}", f"![{title}](results/{picture.name})"]
        if data["bars"]:
            parts += ["#### Bars", bars_table(data["bars"])]
    return "\n\n".join(parts) or NOTHING


def step_summary() -> str:
    """For README.md: a step of SoftSAE with the published estimator as it chooses its path, beside others."""
    path = RESULTS / STEP_FILE
    if not path.exists():
        return NOTHING
    rows = json.loads(path.read_text())["rows"]
    body = []
    for shape in STEP_SHAPES:
        ours = sparse_bars.fastest([row for row in rows if row["path"] == "auto"], shape, WIDE, "bfloat16")
        if ours is None:
            continue
        authors = sparse_bars.fastest(rows, shape, SOFTSAE_REFERENCE, "TF32")
        topk = sparse_bars.fastest(rows, shape, TOPK_REFERENCE, "TF32")
        cells = ["{}, {}, {}, {}".format(*shape), f"{ours['ms']:.3g} ms", ours["took"]]
        for peer in (authors, topk):
            cells.append(f"{peer['ms']:.3g} ms ({peer['ms'] / ours['ms']:.3g}×)" if peer else "–")
        cells.append(f"{ours['beyond_bytes'] / authors['beyond_bytes']:.2f}" if authors else "–")
        body.append([*cells, ours["commit"][:7]])
    header = ["B, d, n, k", "a step of SoftSAE", "path", "its authors'", "TopK, dictionary_learning"]
    return markdown([*header, "memory, of its authors'", "commit"], body) if body else NOTHING


def curves() -> str:
    """Dense float32 and sparse training on the same batches: how far their losses are apart."""
    body, notes = [], []
    for path in files("curves"):
        data = json.loads(path.read_text())
        for row in data["rows"]:
            numbers = (row["last_loss"], row["explained_variance"], row["l0"], row["seconds"])
            difference = row.get("largest_difference")
            body.append(
                [row["name"], f"{row['steps']:,}", *(f"{value:.4g}" for value in numbers)]
                + ["" if difference is None else f"{difference:.2%}"]
            )
        picture = path.with_suffix(".png").name
        notes += [f"{data['about']} {caption(data['environment'])}.", f"![losses](results/{picture})"]
    header = ["", "steps", "loss at the end", "explained variance", "L0", "seconds", "largest difference"]
    return "\n\n".join([markdown(header, body), *notes]) if body else NOTHING


TABLES = {"sparse": sparse, "step": step, "step-summary": step_summary, "curves": curves}
