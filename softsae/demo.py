"""softsae demo: from a language model and the text in this Python to a SoftSAE and what it found.

Collects activations, trains SoftSAE and TopK at the same mean number of active latents, and compares
them, with an untrained autoencoder as control, on held-out text.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from softsae import runs
from softsae.activations import HELDOUT, TRAIN
from softsae.activations.shards import ShardSource
from softsae.activations.tensors import TensorSource
from softsae.architectures import EstimatorConfig, SoftSAEConfig
from softsae.autoencoder import SparseAutoencoder
from softsae.commands import (
    BATCH,
    collect_parts,
    explained_interruption,
    load_model,
    measure_cross_entropy,
)
from softsae.config import AutoencoderConfig, RunConfig, TrainConfig
from softsae.language_model import LanguageModel
from softsae.metrics import evaluate
from softsae.options import CollectConfig, DemoOptions
from softsae.report.demo import DemoResult, draw, write_report
from softsae.report.tokens import Shown, token_statistics, untrained
from softsae.text import corpus
from softsae.trainer import Trainer, pick_device

ACTIVATIONS = "activations"
GPU_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Sizes:
    """What an option that was left out becomes."""

    n: int
    tokens: int
    steps: int
    batch_size: int
    lr: float
    cross_entropy_tokens: int


# Measured: explained variance and time on 2 CPU cores and on one H200 (see the README).
ON_CPU = Sizes(n=3072, tokens=100_000, steps=1200, batch_size=512, lr=2e-3, cross_entropy_tokens=4096)
ON_GPU = Sizes(n=4096, tokens=200_000, steps=2000, batch_size=2048, lr=1e-3, cross_entropy_tokens=16_384)
QUICK = Sizes(n=512, tokens=5000, steps=100, batch_size=256, lr=2e-3, cross_entropy_tokens=512)


def demo(options: DemoOptions) -> None:
    """Runs the demo, or what is left of it, and prints its report."""
    out = Path(options.out)
    device = pick_device(options.device)
    sizes = fill_in(options, device)
    runs.check_free(out, options.resume)
    clock = Clock(out / "timings.json")
    with clock("text and language model"):
        lm = load_model(options)
        layer = options.layer if options.layer is not None else min(15, len(lm.blocks) // 2)
        lm.check_layer(layer)
        documents = corpus(options.text, options.heldout)
    runs.open_run(out, "demo", options, options.resume)
    with explained_interruption("demo", out):
        with clock("collecting activations"):
            train, held = activations(options, sizes, lm, documents, layer, out / ACTIVATIONS)
            source = on_gpu(train, device)
        with clock("training SoftSAE"):
            section = SoftSAEConfig(estimator=EstimatorConfig(kind=options.estimator))
            model = AutoencoderConfig(d=train.d, n=sizes.n, k=options.k, softsae=section)
            softsae = fit(model, sizes, options, source, out / "softsae")
        with clock("training TopK"):
            budget = evaluate(softsae, train.in_order(BATCH), limit=16)["l0"]["mean"]
            rival = AutoencoderConfig(d=train.d, n=sizes.n, k=max(1, round(budget)), architecture="topk")
            topk = fit(rival, sizes, options, source, out / "topk")
        with clock("evaluation"):
            result = compare(lm, softsae, topk, train, held, sizes, options)
        with clock("plots"):
            drawn = draw(out, result)
    print(write_report(out, result, drawn, clock.seconds).read_text())


def fill_in(options: DemoOptions, device: torch.device) -> Sizes:
    """The options' sizes, and the device's where an option was left out."""
    usual = QUICK if options.quick else ON_CPU if device.type == "cpu" else ON_GPU
    names = Sizes.__dataclass_fields__
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return Sizes(**{**vars(usual), **given})


def activations(
    options: DemoOptions, sizes: Sizes, lm: LanguageModel, documents, layer: int, folder: Path
) -> tuple[ShardSource, ShardSource]:
    """The training and the held-out part; collected unless an interrupted demo has done so."""
    if not folder.exists():
        config = CollectConfig(layer=layer, dtype="float32")
        collect_parts(lm, documents, folder, config, sizes.tokens, options.heldout, options.seed)
    return ShardSource(folder / TRAIN), ShardSource(folder / HELDOUT)


def on_gpu(source: ShardSource, device: torch.device):
    """Activations that fit are trained on from the GPU's memory: there, gathering rows is free."""
    if device.type != "cuda" or 4 * source.rows * source.d > GPU_BYTES:
        return source
    return TensorSource(torch.cat([batch.to(device) for batch in source.in_order(16 * BATCH)]))


def fit(model: AutoencoderConfig, sizes: Sizes, options: DemoOptions, source, out: Path) -> SparseAutoencoder:
    """Trains, or goes on with training, one autoencoder."""
    train = TrainConfig(
        steps=sizes.steps,
        batch_size=min(sizes.batch_size, len(source)),
        lr=sizes.lr,
        device=str(options.device),
        seed=options.seed,
        checkpoint_every=200,
        log_every=20,
    )
    return Trainer(RunConfig(model, train), out=out).fit(source)


def compare(
    lm: LanguageModel,
    softsae: SparseAutoencoder,
    topk: SparseAutoencoder,
    train: ShardSource,
    held: ShardSource,
    sizes: Sizes,
    options: DemoOptions,
) -> DemoResult:
    """Everything that is measured on held-out text."""
    control = untrained(softsae, next(train.batches(4 * BATCH, options.seed)))
    trio = {"SoftSAE": softsae, "TopK": topk, "untrained": control}
    sequences = held.sequences.draw(sizes.cross_entropy_tokens, options.seed)
    return DemoResult(
        model=lm.name,
        manifest=train.manifest,
        heldout_rows=held.rows,
        sizes=vars(sizes),
        k=options.k,
        topk_k=topk.config.k,
        estimator=options.estimator,
        device=describe_device(softsae.b_dec.device),
        evaluations={name: evaluate(sae, held.in_order(BATCH)) for name, sae in trio.items()},
        cross_entropy=measure_cross_entropy(lm, held, sequences, trio),
        statistics=token_statistics(softsae, held),
        held=held,
        shown=Shown(lm.tokenizer, held.sequences),
    )


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class Clock:
    """Seconds by stage, kept in a file, so that a resumed demo adds to them."""

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    @contextmanager
    def __call__(self, stage: str):
        started = time.perf_counter()
        print(f"\n{stage} ...", flush=True)
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            self.save()

    def save(self) -> None:
        if self.file.parent.is_dir():
            runs.write_json(self.file, self.seconds)
