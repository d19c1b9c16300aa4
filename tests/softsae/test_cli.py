"""The command line from end to end on a tiny random model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml

import softsae
from softsae.cli import main
from tests.softsae import command

ROOT = Path(softsae.__file__).parents[1]
SMALL = ["--autoencoder.n=64", "--autoencoder.k=6", "--train.batch_size=64", "--train.log_every=5"]
pytestmark = pytest.mark.usefixtures("tiny_model")


def importable() -> dict[str, str]:
    """The environment of a process that finds the source tree, and what this one finds."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start(*arguments):
    """A command in a process of its own."""
    environment = {**importable(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "softsae", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def run(*arguments, status=0):
    """What a command prints; it must end with the given status."""
    return command.run(*arguments, status=status)[0]


@pytest.fixture(scope="module")
def collected(tiny_model, prose, tmp_path_factory):
    """What `softsae collect` makes of the tiny model."""
    out = tmp_path_factory.mktemp("collected") / "acts"
    said = run("collect", "--model", tiny_model, "--text", prose, "--out", out, "--tokens", 3000,
                  "--collect.layer", 2, "--collect.context", 64, "--collect.shard_rows", 1000)  # fmt: skip
    assert f"{out}/train" in said and "model.layers.2.output" in said
    return out


@pytest.fixture(scope="module")
def trained(collected, tmp_path_factory):
    """A finished run of `softsae train`."""
    out = tmp_path_factory.mktemp("runs") / "run"
    said = run("train", "--activations", collected, "--out", out, "--train.steps", 40, *SMALL)
    assert "explained variance" in said
    return out


def test_collect_writes_both_parts(collected):
    manifest = json.loads((collected / "train" / "manifest.json").read_text())
    assert manifest["rows"] > 2000 and len(manifest["shards"]) == -(-manifest["rows"] // 1000)
    assert manifest["layer"] == 2 and len(manifest["shards"][0]["sha256"]) == 64
    assert json.loads((collected / "heldout" / "manifest.json").read_text())["rows"] > 100


def test_train_leaves_a_complete_run_folder(trained):
    for name in ("config.yaml", "config.json", "metrics.jsonl", "checkpoint.safetensors", "summary.md",
                 "sae/sae.safetensors", "plots/training.png", "plots/l0.png"):  # fmt: skip
        assert (trained / name).stat().st_size > 0, name
    assert (trained / "plots" / "training.png").read_bytes()[:4] == b"\x89PNG"
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "event" not in r] == list(range(5, 41, 5))
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation["part"] == "held-out" and evaluation["metrics"]["samples"] > 100
    shown = f"{evaluation['metrics']['explained_variance']:.4f}"
    assert shown in (trained / "summary.md").read_text()


def test_eval_adds_cross_entropy_with_an_untrained_control(trained):
    run("eval", trained, "--activations", *[_heldout(trained)], "--cross_entropy_tokens", 300)
    found = json.loads((trained / "evaluation.json").read_text())["cross_entropy"]
    assert set(found["untouched"]) == {"zero", "run", "untrained"} == set(found["replaced"])
    assert found["tokens"] >= 250
    gap = found["untouched"]["zero"] - found["clean"]
    share = (found["untouched"]["zero"] - found["untouched"]["run"]) / gap
    assert found["recovered"]["untouched"]["run"] == pytest.approx(share)
    assert "untrained" in (trained / "summary.md").read_text()


def test_eval_at_another_k_leaves_the_runs_own_evaluation_alone(trained):
    before = (trained / "evaluation.json").read_text()
    said = run("eval", trained, "--activations", _heldout(trained), "--cross_entropy_tokens", 300, "--k", 2)
    found = json.loads((trained / "evaluation-k2.json").read_text())
    assert json.loads(said) == found and found["k"] == 2.0
    assert found["metrics"]["l0"]["max"] == 2 and found["metrics"]["k_hat"]["mean"] == 2
    sae = softsae.load(trained / "sae")
    rows = softsae.activations.as_source(Path(_heldout(trained)))
    at_2 = softsae.evaluate(sae, rows.in_order(64), k=2)
    assert found["metrics"]["explained_variance"] == pytest.approx(at_2["explained_variance"], abs=1e-6)
    assert (trained / "evaluation.json").read_text() == before
    (trained / "evaluation-k2.json").unlink()


def _heldout(trained):
    return yaml.safe_load((trained / "config.yaml").read_text())["activations"] + "/heldout"


def test_info_describes_everything(trained, collected, tmp_path):
    said = run("info")
    assert "backend reference: available" in said and "torch" in said
    said = run("info", trained)
    assert "softsae: d=32, n=64, k=6" in said and "step 40" in said
    said = run("info", collected, "--verify")
    assert said.count("activations of d=32") == 2
    np.save(tmp_path / "x.npy", np.zeros((7, 3), np.float32))
    said = run("info", "--path", tmp_path / "x.npy")
    assert "7 activations of d=3" in said


def test_an_interrupted_run_leaves_a_checkpoint_and_resumes(collected, tmp_path):
    """Interrupted, resumed and finished, a run ends where an uninterrupted one does."""
    arguments = ["--activations", collected, "--train.steps", "400", "--train.checkpoint_every", "0", *SMALL]
    run("train", "--out", tmp_path / "whole", *arguments)
    process = start("train", "--out", tmp_path / "cut", *arguments)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "Traceback" not in err and f"softsae train --out {tmp_path / 'cut'} --resume" in err
    assert not (tmp_path / "cut" / "sae").exists()
    run("info", "--path", tmp_path / "cut")
    run("train", "--out", tmp_path / "cut", "--resume")
    whole, cut = (tmp_path / name / "sae" / "sae.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_a_configuration_file_and_overrides(collected, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"activations": str(collected), "train": {"steps": 30, "batch_size": 32},
                                    "autoencoder": {"n": 48, "k": 4, "architecture": "topk"}}))  # fmt: skip
    run("train", "--config", file, "--out", tmp_path / "r", "--train.steps", 7, "--seed", 5)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["train"]["steps"], config["train"]["batch_size"], config["train"]["seed"]) == (7, 32, 5)
    assert config["autoencoder"]["n"] == 48 and config["autoencoder"]["architecture"] == "topk"


def test_train_takes_an_npy_file(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32))
    run("train", "--activations", tmp_path / "x.npy", "--out", tmp_path / "r", "--train.steps", 10, *SMALL)
    assert json.loads((tmp_path / "r" / "evaluation.json").read_text())["part"] == "training"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing"],
            "unknown command 'nothing'; choose one of demo, collect, train, sweep, eval, encode, recipes,"
            " info",
        ),
        (["train", "--out", "{tmp}/r"], "activations"),
        (["train", "--out", "{tmp}/r", "--activations", "{tmp}/no"], "activations '{tmp}/no' do not exist"),
        (["train", "--out", "{tmp}/r", "--activations", "{acts}", "--train.steps", "0"], "steps=0"),
        (["train", "--out", "{tmp}/r", "--activations", "{acts}", "--train.odd", "1"], "--train.odd"),
        (["train", "--out", "{tmp}/r", "--activations", "{acts}", "--autoencoder.d", "7"], "d=7"),
        (["train", "--out", "{tmp}/r", "--activations", "{acts}", "--device", "tpu9"], "device='tpu9'"),
        (
            [
                "train",
                "--out",
                "{tmp}/r",
                "--activations",
                "{acts}",
                "--autoencoder.architecture",
                "relu",
                "--train.regularizer.r2_weight",
                "0.1",
            ],
            "r2_weight=0.1 need a top-k selection",
        ),
        (["train", "--out", "{run}", "--activations", "{acts}"], "'{run}' is not empty: go on with --resume"),
        (["train", "--out", "{run}", "--resume", "--autoencoder.n", "65"], "another configuration"),
        (["train", "--out", "{tmp}/r", "--resume"], "no run in '{tmp}/r'"),
        (["collect", "--out", "{acts}", "--model", "{model}"], "'{acts}' is not empty"),
        (["collect", "--out", "{tmp}/r", "--model", "{model}", "--collect.layer", "9"], "layer=9"),
        (["collect", "--out", "{tmp}/r", "--model", "no/such-model"], "model 'no/such-model'"),
        (["demo", "--out", "{tmp}/r", "--model", "{model}", "--text", "{tmp}/no.txt"], "no.txt"),
        (["eval", "--run", "{tmp}/no"], "no autoencoder in '{tmp}/no'"),
        (["eval", "{run}", "--activations", "{acts}/heldout", "--k", "65"], "k=65.0 must be a number"),
        (["eval", "{run}", "--activations", "{acts}/heldout", "--k", ".nan"], "k=nan"),
        (["info", "--path", "{tmp}/no"], "'{tmp}/no' does not exist"),
        (["demo", "--out", "{run}", "--resume"], "not from softsae demo"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(
    arguments, message, tmp_path, collected, trained, tiny_model, capsys
):
    names = {"tmp": tmp_path, "acts": collected, "run": trained, "model": tiny_model}
    before = sorted(p for p in trained.rglob("*"))
    status = main([argument.format(**names) for argument in arguments])
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("softsae: error: ") and err.count("\n") == 1
    assert message.format(**names) in err
    assert list(tmp_path.iterdir()) == [] and sorted(p for p in trained.rglob("*")) == before


def test_help_is_quick_and_names_the_options():
    code = "import sys, softsae.cli; softsae.cli.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=importable())
    with pytest.raises(SystemExit) as ended, redirect_stdout(io.StringIO()) as said:
        main(["train", "--help"])
    said = said.getvalue()
    assert ended.value.code == 0
    assert "--autoencoder.softsae.k_max" in said and "the largest k_hat" in said and "--resume" in said


def test_demo_from_end_to_end(tiny_model, prose, tmp_path):
    out = tmp_path / "demo"
    said = run("demo", "--model", tiny_model, "--text", prose, "--quick", "--out", out, "--n", 128, "--k", 8)
    results = json.loads((out / "results.json").read_text())
    assert set(results["evaluations"]) == {"SoftSAE", "TopK", "untrained"}
    for name in ("SoftSAE", "TopK"):
        assert results["evaluations"][name]["explained_variance"] > 0.2
    assert results["topk_k"] == pytest.approx(results["evaluations"]["SoftSAE"]["l0"]["mean"], abs=1.5)
    assert set(results["cross_entropy"]["recovered"]) == {"untouched", "replaced"}
    assert said.strip().endswith((out / "summary.md").read_text().strip())
    for heading in ("## Reconstruction", "## How the budget", "## A few latents", "how long it took"):
        assert heading in said
    for name in ("headline.png", "plots/k_hat.png", "plots/training.png", "plots/l0.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert softsae.load(out / "softsae" / "sae").config.n == 128
    run("demo", "--out", out, "--resume")  # everything is there: the same numbers once more
    assert json.loads((out / "results.json").read_text())["evaluations"] == results["evaluations"]
