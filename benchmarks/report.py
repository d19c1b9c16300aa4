"""Write the tables of README.md and benchmarks/README.md, and the plots of the latter, from
benchmarks/results; no figure there is typed by hand.

    python -m benchmarks.report            # rewrite the tables between their markers, draw stale plots
    python -m benchmarks.report --check    # exit 1 when a table or a plot is stale

A table stands between `<!-- table NAME -->` and `<!-- end -->`, NAME being a function of TABLES. A plot
holds a digest of what it shows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

from benchmarks import encoding_tables, plots, sparse_plots, sparse_tables, speed_tables
from benchmarks.environment import RESULTS, ROOT
from benchmarks.tables import caption, load, markdown

README = ROOT / "README.md"
RECOVERED = ("recovered", "recovered_all_replaced")
DOCUMENTS = (README, ROOT / "benchmarks" / "README.md")


def accuracy() -> str:
    """Worst ratio of every error to its bar over all cells, per backend, form and machine."""
    names = ("p", "sum", "log", "grad_x", "grad_k", "grad_alpha")
    body = []
    for path in sorted(RESULTS.glob("accuracy-*.json")):
        rows = json.loads(path.read_text())["rows"]
        for backend, form in dict.fromkeys((r["backend"], r["form"]) for r in rows):
            cells = [r for r in rows if (r["backend"], r["form"]) == (backend, form)]
            worst = [f"{max(r[name] for r in cells):.2f}" if name in cells[0] else "" for name in names]
            body.append([backend, form, path.stem.removeprefix("accuracy-"), str(len(cells)), *worst])
    return markdown(["backend", "form", "on", "cells", *names], body)


def fuzz() -> str:
    """The long runs of random calls."""
    body = []
    for path in sorted(RESULTS.glob("fuzz-*.json")):
        data = json.loads(path.read_text())
        for r in data["rows"]:
            machine = caption(data["environment"])
            body.append([r["backend"], f"{r['rows']:,}", str(r["first_seed"]), machine])
    return markdown(["backend", "rows, all within the bars", "first seed", "on"], body)


def sanitizers() -> str:
    """What each tool of compute-sanitizer said of which GPU tests."""
    body = []
    for path in sorted(RESULTS.glob("sanitizers-*.json")):
        data = json.loads(path.read_text())
        for r in data["rows"]:
            counts = (*(r["tests"].get(name, 0) for name in ("passed", "failed")), r["errors"])
            names = [r["tool"], ", ".join(r["of"]), ", ".join(r["backends"]), data["environment"]["gpu"]]
            body.append([*names, *map(str, (*counts, len(r["unfinished"]))), r["commit"][:7]])
    header = ["tool", "tests of", "backends", "on", "passed", "failed", "errors", "not reached", "commit"]
    return markdown(header, body)


def transformer() -> str:
    """The pruning transformer, trained in several ways."""
    data = load("transformer-h200.json")
    body = [
        [r["way"], f"{r['first_loss']:.3f}", f"{r['every_50th_loss'][2]:.3f}", f"{r['last_loss']:.4f}"]
        + [f"{r['tokens_kept']:.1f}"]
        for r in data["rows"]
    ]
    header = ["", "first loss", "at step 100", "last 20 of 1000", "tokens kept of 64"]
    return markdown(header, body) + f"\n\n{caption(data['environment'])}"


def demo() -> str:
    """SoftSAE, TopK and the untrained control of the demo, one column group per machine."""
    body: list[list[str]] = []
    for path in sorted(RESULTS.glob("demo-*.json")):
        data = json.loads(path.read_text())
        result = data["rows"][0]
        where = f"{result['device']}, {sum(result['seconds'].values()):.0f} s"
        for name, found in result["evaluations"].items():
            label = f"{name}, {result['estimator']} estimator" if name == "SoftSAE" else name
            ce = result["cross_entropy"]
            body.append(
                [
                    where,
                    label,
                    f"{found['explained_variance']:.3f}",
                    f"{found['l0']['mean']:.1f} ± {found['l0']['sd']:.1f}",
                    str(found["dead_latents"]),
                    f"{ce['untouched'][name]:.3f}",
                    f"{ce['recovered']['untouched'][name]:.4f}",
                    f"{ce['recovered']['replaced'][name]:.4f}",
                ]
            )
            where = ""
    header = [
        "on",
        "",
        "explained variance",
        "L0",
        "dead",
        "cross-entropy",
        "recovered",
        "all positions replaced",
    ]
    return markdown(header, body)


def estimators() -> str:
    """The demo with either k estimator, per seed: SoftSAE and the TopK that was trained beside it."""
    data = load("estimators-h200.json")
    body = []
    for r in data["rows"]:
        if r["autoencoder"] == "untrained":
            continue
        label = f"SoftSAE, {r['estimator']} estimator" if r["autoencoder"] == "SoftSAE" else "TopK beside it"
        numbers = (r["explained_variance"], r["recovered"], r["recovered_all_replaced"])
        body.append([str(r["seed"]), label, f"{r['l0_mean']:.1f}", *(f"{value:.4f}" for value in numbers)])
    header = ["seed", "", "L0", "explained variance", "recovered", "all positions replaced"]
    return markdown(header, body) + f"\n\n{caption(data['environment'])}"


def sweep(device: str, pictures: str) -> str:
    """Every architecture at three k, at the best of its learning rates, and the frontier."""
    data = load(f"sweep-{device}.json")
    body = []
    for r in data["rows"]:
        if r.get("error"):
            body.append([r["name"], r["error"], *[""] * 6])
        elif r["best"]:
            body.append(
                [
                    r["group"],
                    f"{r['lr']:.3g}" if "lr" in r else "",
                    f"{r['explained_variance']:.4f}",
                    f"{r['l0_mean']:.1f} ± {r['l0_sd']:.1f}",
                    str(r["dead_latents"]),
                    *(f"{r[name]:.4f}" if r[name] is not None else "" for name in RECOVERED),
                    f"{r['samples_per_second']:,.0f}" if "samples_per_second" in r else "",
                ]
            )
    header = ["", "learning rate", "explained variance", "L0", "dead", "recovered",
              "all positions replaced", "samples per second"]  # fmt: skip
    trained = next(r for r in data["rows"] if "steps" in r)
    sizes = (
        f"n = {trained['n']}, {trained['steps']} steps of {trained['config']['train']['batch_size']};"
        f" {data['samples']:,} {data['part']} activations"
    )
    picture = f"![explained variance against L0]({pictures}/sweep-{device}.png)"
    return "\n\n".join([markdown(header, body), f"{sizes}. {caption(data['environment'])}", picture])


def peers_accuracy() -> str:
    """Worst errors of every implementation over all cells; those of p and gradients where p is LapSum's."""
    errors = ("p", "sum_relative", "grad_x", "grad_k", "grad_alpha")
    body = []
    for path in sorted(RESULTS.glob("peers-*.json")):
        data = json.loads(path.read_text())
        for name in data["peers"]:
            cells = [r for r in data["rows"] if r["name"] == name]
            found = ([r[error] for r in cells if r[error] is not None] for error in errors)
            counts = (str(sum(r[count] for r in cells)) for count in ("rows", "not_finite"))
            worst = (f"{max(values):.1e}" if values else "–" for values in found)
            body.append([name, path.stem.removeprefix("peers-"), *counts, *worst])
    header = ["implementation", "on", "rows", "not finite", "p", "sum", "grad_x", "grad_k", "grad_alpha"]
    return markdown(header, body)


def peers_features() -> str:
    """What every implementation can do: yes, or in a word what came instead."""
    out = []
    for path in sorted(RESULTS.glob("peers-*.json")):
        data = json.loads(path.read_text())
        names = list(data["features"])
        body = [
            [feature, *(data["features"][name][feature].split(":")[0] for name in names)]
            for feature in data["features"][names[0]]
            if any(not found[feature].startswith("not tried") for found in data["features"].values())
        ]
        versions = "; ".join(f"{n} {p['version']}" for n, p in data["peers"].items() if "softtopk" not in n)
        where = path.stem.removeprefix("peers-")
        out.append(f"{markdown([where, *names], body)}\n\n{caption(data['environment'])}. {versions}")
    return "\n\n".join(out)


TABLES = {
    "peers-accuracy": peers_accuracy,
    "peers-features": peers_features,
    "estimators": estimators,
    "demo": demo,
    "sweep": partial(sweep, "h200", "benchmarks/results"),
    "sweep-cpu": partial(sweep, "cpu", "results"),
    "accuracy": accuracy,
    "fuzz": fuzz,
    "sanitizers": sanitizers,
    "transformer": transformer,
    **speed_tables.TABLES,
    **sparse_tables.TABLES,
    **encoding_tables.TABLES,
}


def render(text: str) -> str:
    """The text with every marked table made anew; KeyError for a name that TABLES lacks."""
    pattern = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda m: m[1] + TABLES[m[2]]() + "\n" + m[3], text)


def stale() -> list[Path]:
    """The documents and pictures that do not show what the result files hold."""
    found = [path for path in DOCUMENTS if render(path.read_text()) != path.read_text()]
    for path in speed_tables.files():
        found += plots.stale(path, json.loads(path.read_text())["rows"])
    return found + sparse_plots.stale()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when stale")
    args = parser.parse_args()
    if args.check:
        old = ", ".join(str(path.relative_to(ROOT)) for path in stale())
        sys.exit(f"stale: {old}; run python -m benchmarks.report" if old else 0)
    for path in speed_tables.files():
        plots.draw(path, json.loads(path.read_text())["rows"])
    sparse_plots.draw()
    for path in DOCUMENTS:
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
