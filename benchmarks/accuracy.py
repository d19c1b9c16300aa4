"""The accuracy table: every backend at the bars of tests/accuracy.py, worst ratio per cell.

    python -m benchmarks.accuracy                  # all backends that run here, on their device

A row of the result file is one (backend, form, family, n, alpha) over all budgets: the worst error of
p and sum(p) (form p) or of the logarithm (forms log and log_complement), and of grad_x, grad_k and
grad_alpha, each in units of its bar (1 = at the bar).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

import softtopk
from benchmarks.environment import RESULTS, device_label, write
from softtopk import dispatch
from tests.accuracy import FORMS, oracle, ratios, run
from tests.cases import ALPHAS, BAR_FAMILIES, LENGTHS, budgets, make


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/accuracy-DEVICE.json")
    args = parser.parse_args()
    wanted = ("cpu", "reference") if args.device == "cpu" else ("cuda", "triton", "reference")
    backends = [b for b in wanted if softtopk.available_backends()[b] is None]
    rows = []
    for family in BAR_FAMILIES:
        for n in LENGTHS:
            k = torch.tensor(budgets(n), dtype=torch.float64)
            x = make(family, len(k), n, seed=n)
            v = torch.randn(x.shape, generator=torch.Generator().manual_seed(n + 1))
            for alpha, form in itertools.product(ALPHAS, FORMS):
                want = oracle(x, k, alpha, v, form=form)
                for backend in backends:
                    got = run(
                        dispatch.module(backend),
                        *(t.to(args.device) for t in (x, k)),
                        alpha,
                        v.to(args.device),
                        form=form,
                    )
                    worst = ratios(got, want, k, alpha, v, form)
                    cell = {"backend": backend, "form": form, "family": family, "n": n, "alpha": alpha}
                    rows.append(cell | {name: float(f"{r:.3g}") for name, r in worst.items()})
    write(args.out or RESULTS / f"accuracy-{device_label(args.device)}.json", rows)
    for backend, form in itertools.product(backends, FORMS):
        cells = [r for r in rows if (r["backend"], r["form"]) == (backend, form)]
        named = (name for name in ("p", "sum", "log", "grad_x", "grad_k", "grad_alpha") if name in cells[0])
        worst = {name: max(r[name] for r in cells) for name in named}
        print(f"{backend:10} {form:15} {len(cells)} cells, worst ratios to the bars: {worst}")


if __name__ == "__main__":
    main()
