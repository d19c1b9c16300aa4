"""The same SoftSAE on the same batches, dense in float32 and on the sparse path, and how far losses differ.

    python -m benchmarks.curves                            # collects activations as softsae demo does
    python -m benchmarks.curves --activations runs/demo/activations --steps 4000
    python -m benchmarks.curves --quick --device cpu       # synthetic activations, a few steps

Writes benchmarks/results/curves-DEVICE.json and a picture of it. A row: name, path, dtype, steps, seconds,
last_loss (the mean of the last WINDOW losses), explained_variance and l0 on held-out activations,
largest_difference (of losses averaged over WINDOW of them, relative to the dense float32 ones), at_step,
losses (of the reconstruction, every EVERY steps). Batches, their order and the start are the same for all.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, device_label, environment, write
from benchmarks.tables import caption
from softsae import AutoencoderConfig, RunConfig, SoftSAEConfig, TrainConfig, Trainer, demo
from softsae.activations import HELDOUT, TRAIN
from softsae.activations.shards import ShardSource
from softsae.activations.tensors import TensorSource
from softsae.architectures import EstimatorConfig
from softsae.commands import BATCH, load_model
from softsae.metrics import evaluate
from softsae.options import DemoOptions
from softsae.text import corpus

NUDGED = "dense float32, lr up by 1e-6 of it"  # how far roundings alone take two trainings apart
WAYS = {  # name -> (path, dtype of the products); the first is what the others are held against
    "dense float32": ("dense", "float32"),
    "sparse float32": ("sparse", "float32"),
    "dense bfloat16": ("dense", "bfloat16"),
    "sparse bfloat16": ("sparse", "bfloat16"),
    NUDGED: ("dense", "float32"),
}
EVERY = 10  # steps between losses
WINDOW = 5  # losses that are averaged
COLOURS = ("black", "#3182bd", "#fdae6b", "#b2182b", "0.6")


def smoothed(losses: list[float]) -> list[float]:
    """Means of WINDOW losses in a row."""
    count = len(losses) - WINDOW + 1
    return [sum(losses[i : i + WINDOW]) / WINDOW for i in range(count)]


def largest_difference(losses: list[float], dense: list[float]) -> tuple[float, int]:
    """Of averaged losses, relative to the dense ones, and the step at the end of that window."""
    pairs = zip(smoothed(losses), smoothed(dense), strict=True)
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    worst = max(range(len(differences)), key=differences.__getitem__)
    return differences[worst], (worst + WINDOW) * EVERY


def sources(args: argparse.Namespace) -> tuple[object, torch.Tensor, str]:
    """The training part, held-out activations and what they are, in a sentence."""
    if args.quick:
        generator = torch.Generator().manual_seed(0)
        factors = torch.randn(64, 32, generator=generator)
        on = (torch.rand(6000, 64, generator=generator) < 0.06).float()
        x = (on * torch.randn(on.shape, generator=generator).abs()) @ factors
        return TensorSource(x[:5000]), x[5000:], "Synthetic activations of 64 factors in 32 dimensions."
    folder = args.activations
    if folder is None:
        folder = Path(tempfile.mkdtemp()) / "activations"
        options = DemoOptions(device=args.device, tokens=args.tokens)
        sizes = demo.fill_in(options, torch.device(args.device))
        lm = load_model(options)
        layer = min(15, len(lm.blocks) // 2)
        demo.activations(options, sizes, lm, corpus(options.text, options.heldout), layer, folder)
        del lm
    train, held = ShardSource(folder / TRAIN), ShardSource(folder / HELDOUT)
    held_out = torch.cat(list(held.in_order(BATCH)))
    source = demo.on_gpu(train, torch.device(args.device))
    return source, held_out, f"{train.rows:,} activations of width {train.d} of a language model."


def train(args: argparse.Namespace, name: str, source, held_out: torch.Tensor) -> dict:
    path, dtype = WAYS[name]
    losses: list[float] = []

    def keep(trainer: Trainer, record: dict) -> None:
        if "loss_reconstruction" in record:
            losses.append(record["loss_reconstruction"])

    estimator = EstimatorConfig(kind=args.estimator)
    model = AutoencoderConfig(n=args.n, k=args.k, softsae=SoftSAEConfig(estimator=estimator))
    training = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr * (1 + 1e-6) if name == NUDGED else args.lr,
        dtype=dtype,
        path=path,
        device=args.device,
        log_every=EVERY,
    )
    started = time.perf_counter()
    sae = Trainer(RunConfig(model, training), callbacks=[keep], progress=False).fit(source)
    seconds = time.perf_counter() - started
    found = evaluate(sae, held_out.split(BATCH))
    return {
        **{"name": name, "path": path, "dtype": dtype, "steps": args.steps, "seconds": round(seconds, 1)},
        "last_loss": sum(losses[-WINDOW:]) / WINDOW,
        "explained_variance": round(found["explained_variance"], 5),
        "l0": round(found["l0"]["mean"], 3),
        "losses": [float(f"{loss:.6g}") for loss in losses],
    }


def compare(rows: list[dict]) -> None:
    """Adds to every row how far it is from the first."""
    dense = rows[0]["losses"]
    for row in rows[1:]:
        difference, step = largest_difference(row["losses"], dense)
        row |= {"largest_difference": float(f"{difference:.4g}"), "at_step": step}


def draw(path: Path, rows: list[dict], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    dense = smoothed(rows[0]["losses"])
    steps = [(i + WINDOW) * EVERY for i in range(len(dense))]
    for row, colour in zip(rows, COLOURS, strict=False):
        line = smoothed(row["losses"])
        above.plot(steps, line, color=colour, lw=1.2, label=row["name"])
        if row is not rows[0]:
            below.plot(steps, [a / b - 1 for a, b in zip(line, dense, strict=True)], color=colour, lw=1)
    above.set(yscale="log", ylabel="reconstruction loss", title=title)
    below.set(xlabel="step", ylabel="relative\ndifference")
    below.axhline(0, color="0.6", lw=0.8)
    above.legend(frameon=False)
    for panel in (above, below):
        panel.spines[["top", "right"]].set_visible(False)
    above.title.set_fontsize(7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--activations", type=Path, help="a demo's folder of them; else they are collected")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to collect, where the text has them")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--estimator", default="wide", choices=("wide", "bottleneck"))
    parser.add_argument("--n", type=int, default=16384)
    parser.add_argument("--k", type=float, default=32.0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--quick", action="store_true", help="small; the file goes to --out alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/curves-DEVICE.json")
    args = parser.parse_args()
    if args.quick:
        args.n, args.k, args.steps, args.batch_size, args.lr = 256, 4.0, 100, 128, 2e-3
    path = args.out
    if path is None and not args.quick:
        path = RESULTS / f"curves-{device_label(args.device)}.json"
    source, held_out, what = sources(args)
    rows = []
    for name in dict.fromkeys([next(iter(WAYS)), *args.ways]):
        rows.append(train(args, name, source, held_out))
        print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
    compare(rows)
    for row in rows[1:]:
        print(f"{row['name']}: {row['largest_difference']:.3%} at step {row['at_step']}")
    if path is not None:
        about = (
            f"{what} n = {args.n}, k = {args.k:g}, {args.estimator} estimator, {args.steps:,} steps of"
            f" {args.batch_size}, {args.steps * args.batch_size:,} samples in all."
        )
        write(path, rows, about=about)
        draw(path.with_suffix(".png"), rows, caption(environment()))


if __name__ == "__main__":
    main()
