"""Draw p against x for three alphas: the picture of the README's section on choosing alpha.

python -m benchmarks.plot_alpha                # writes results/alpha.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.environment import RESULTS
from softtopk import soft_topk

N, K, ALPHAS = 40, 10, (1.0, 0.1, 0.01)
COLOURS = ("#9ecae1", "#3182bd", "#08306b")  # light for soft, dark for hard


def draw(path: Path) -> None:
    x = torch.randn(N, generator=torch.Generator().manual_seed(3)).double()
    x.requires_grad_()
    figure, (weights, slopes) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    for alpha, colour in zip(ALPHAS, COLOURS, strict=True):
        p, b = soft_topk(x, K, alpha, return_threshold=True)
        t = (torch.linspace(-2.6, 2.6, 2001, dtype=torch.float64) - b) / alpha
        h = torch.exp(-t.abs()) / 2
        values = (t * alpha + b).numpy()
        weights.plot(
            values, torch.where(t > 0, 1 - h, h).numpy(), color=colour, lw=1.6, label=f"α = {alpha:g}"
        )
        weights.plot(x.detach(), p.detach(), "o", color=colour, ms=4)
        slopes.semilogy(values, (h / alpha).numpy(), color=colour, lw=1.6)
        slopes.semilogy(x.detach(), torch.minimum(p, 1 - p).detach() / alpha, "o", color=colour, ms=4)
    weights.plot(x.detach(), torch.full((N,), -0.06), "|", color="0.4", ms=7)
    weights.set(
        title=f"weights p: {K} of {N}, Σp = {K} for every α", xlabel="x", ylabel="p", xlim=(-2.6, 2.6)
    )
    slopes.set(title="how much p moves with x − b", xlabel="x", ylabel="dp / dx", ylim=(1e-4, 100))
    slopes.set(xlim=(-2.6, 2.6))
    weights.legend(frameon=False, loc="center left")
    for axes in (weights, slopes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "alpha.png")
    args = parser.parse_args()
    draw(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
