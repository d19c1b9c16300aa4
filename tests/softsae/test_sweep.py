"""Sweeps: the members are what they are alone, one stream is read once, failures and interruptions."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import softsae
from softsae import AutoencoderConfig, RunConfig, Sweep, TrainConfig, Trainer
from softsae.activations.synthetic import SyntheticSource
from softsae.activations.tensors import TensorSource
from softsae.architectures import ARCHITECTURES
from softsae.cli import main
from softsae.report import plots
from softsae.trainer import NonFiniteActivations, pick_device
from tests.softsae.test_cli import collected, run  # noqa: F401

D, N, STEPS = 16, 48, 40
SOURCE = SyntheticSource(D, 32, 1, 6)
DATA = SOURCE.sample(700, seed=9)[0]
HELD = SOURCE.sample(300, seed=5)[0]


def recipe(**fields) -> TrainConfig:
    usual = {"steps": STEPS, "batch_size": 64, "lr": 2e-3, "log_every": 5, "device": "cpu", "dead_after": 60}
    return TrainConfig(**{**usual, **fields})


def config(architecture: str, **fields) -> AutoencoderConfig:
    return AutoencoderConfig(n=N, k=3.5, architecture=architecture, **fields)


def some(*architectures, train=None) -> dict[str, RunConfig]:
    return {name: RunConfig(config(name), recipe(**(train or {}))) for name in architectures}


class Counted(TensorSource):
    """Keeps the numbers of the batches that are read."""

    def __init__(self, x):
        super().__init__(x)
        self.numbers = []

    def batches(self, batch_size, seed, start=0):
        for number, batch in enumerate(super().batches(batch_size, seed, start), start):
            self.numbers.append(number)
            yield batch


def interrupt(at: int):
    """A callback that sends Ctrl-C when a member has logged a step."""

    def callback(name, trainer, record):
        if (name, record["step"]) == ("softsae", at):
            os.kill(os.getpid(), signal.SIGINT)

    return callback


def same(a, b):
    for (name, left), (_, right) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(left, right), name


def timeless(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in r.items() if name != "samples_per_second"} for r in lines]


@pytest.mark.parametrize("together", [None, 2])
def test_members_are_what_they_are_alone_and_the_stream_is_read_once(together, tmp_path):
    source = Counted(DATA)
    names = sorted(ARCHITECTURES)
    sweep = Sweep(some(*names), out=tmp_path / "sweep", together=together, progress=False)
    found = sweep.fit(source, HELD)
    passes = 1 if together is None else -(-len(names) // together)
    assert source.numbers == list(range(STEPS)) * passes
    for name in names if together is None else names[:3]:
        folder = tmp_path / name
        alone = Trainer(config(name), recipe(), out=folder, progress=False)
        same(alone.fit(DATA, HELD), found[name])
        assert timeless(folder) == timeless(tmp_path / "sweep" / name)
        same(softsae.load(tmp_path / "sweep" / name / "sae"), found[name])
        assert not found[name].training and sweep.members[name].steps == STEPS


def test_nonfinite_samples_are_skipped_for_all_and_reported_to_each(tmp_path):
    x = DATA.clone()
    x[7, 3] = torch.nan
    found = Sweep(some("topk", "relu", train={"nonfinite": "skip"}), out=tmp_path / "s", progress=False).fit(
        x
    )
    for name in ("topk", "relu"):
        folder = tmp_path / name
        alone = Trainer(config(name), recipe(nonfinite="skip"), out=folder, progress=False).fit(x)
        same(alone, found[name])
        events = timeless(tmp_path / "s" / name)
        assert events == timeless(folder) and any(r.get("event") == "nonfinite" for r in events)
    with pytest.raises(NonFiniteActivations, match="nonfinite='skip' leaves"):
        Sweep(some("topk", "relu"), progress=False).fit(x)


def test_interrupted_and_resumed_is_bit_identical(tmp_path):
    names = ("softsae", "batchtopk", "gated")
    whole = Sweep(some(*names), out=tmp_path / "whole", progress=False).fit(DATA)
    out, handler = tmp_path / "cut", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after step 20 of 40; .*out="):
        Sweep(some(*names), out=out, callbacks=[interrupt(20)], progress=False).fit(DATA)
    assert signal.getsignal(signal.SIGINT) is handler
    rest = Counted(DATA)
    sweep = Sweep(some(*names), out=out, progress=False)
    found = sweep.fit(rest)
    assert rest.numbers == list(range(20, STEPS))
    for name in names:
        same(whole[name], found[name])
        assert timeless(out / name) == timeless(tmp_path / "whole" / name)
        assert sweep.members[name].steps == STEPS


def test_after_a_crash_members_wait_for_the_one_that_is_behind(tmp_path):
    def crash(name, trainer, record):
        if (name, record["step"]) == ("relu", 20):
            raise KeyboardInterrupt

    x = SOURCE.sample(STEPS * 64, seed=9)[0]
    x[TensorSource(x).order(0, 0)[64 * 4]] = torch.nan  # in batch 4, which each reports once
    names, train = ("topk", "relu", "gated"), {"checkpoint_every": 10, "nonfinite": "skip"}
    out = tmp_path / "cut"
    whole = Sweep(some(*names, train=train), out=tmp_path / "whole", progress=False).fit(x)
    with pytest.raises(KeyboardInterrupt):
        Sweep(some(*names, train=train), out=out, callbacks=[crash], progress=False).fit(x)
    (out / "topk" / "checkpoint.safetensors").unlink()  # as if it and its metrics had not been written
    (out / "topk" / "metrics.jsonl").unlink()
    source = Counted(x)
    found = Sweep(some(*names, train=train), out=out, progress=False).fit(source)
    assert source.numbers == list(range(STEPS))
    for name in names:
        same(whole[name], found[name])
        assert timeless(out / name) == timeless(tmp_path / "whole" / name)


def _header(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()["softsae"]


def test_a_member_whose_loss_is_not_finite_is_left_out_for_good(tmp_path):
    configs = some("topk", "relu")
    configs["wild"] = RunConfig(config("relu"), recipe(lr=1e30, clip_norm=1e30, warmup_steps=0))
    sweep = Sweep(configs, out=tmp_path, progress=False)
    found = sweep.fit(DATA)
    assert sorted(found) == ["relu", "topk"]
    same(Trainer(config("topk"), recipe(), progress=False).fit(DATA), found["topk"])
    wild = sweep.members["wild"]
    assert wild.error.startswith("step ") and "NonFiniteLoss: the loss is" in wild.error
    assert wild.steps < STEPS and not (tmp_path / "wild" / "sae").exists()
    source = Counted(DATA)
    again = Sweep(configs, out=tmp_path, progress=False)
    again.fit(source)
    assert source.numbers == [] and again.members["wild"] == wild
    rows = {row["name"]: row for row in again.evaluate([HELD])}
    assert rows["wild"]["explained_variance"] is None and rows["wild"]["error"] == wild.error
    expected = softsae.evaluate(found["topk"], [HELD])
    assert rows["topk"]["explained_variance"] == expected["explained_variance"]
    assert rows["topk"]["l0_mean"] == expected["l0"]["mean"] and rows["topk"]["error"] is None


def test_a_member_that_raises_is_tried_again(tmp_path):
    def crash(name, trainer, record):
        if (name, record["step"]) == ("relu", 25):
            raise RuntimeError("out of\nsomething")

    train = {"checkpoint_every": 10}
    sweep = Sweep(some("topk", "relu", train=train), out=tmp_path, callbacks=[crash], progress=False)
    assert list(sweep.fit(DATA)) == ["topk"]
    assert sweep.members["relu"].error == "step 25: RuntimeError: out of"
    source = Counted(DATA)
    found = Sweep(some("topk", "relu", train=train), out=tmp_path, progress=False).fit(source)
    assert source.numbers == list(range(20, STEPS))
    same(Trainer(config("relu"), recipe(), progress=False).fit(DATA), found["relu"])
    with pytest.raises(ValueError, match="every autoencoder of the sweep failed: relu: step 25"):
        Sweep(some("relu"), callbacks=[crash], progress=False).fit(DATA)


def test_interrupted_before_the_first_step_nothing_is_there_to_go_on_with(tmp_path):
    def batches():
        raise KeyboardInterrupt
        yield

    source = Counted(DATA)
    source.batches = lambda *_: batches()
    with pytest.raises(KeyboardInterrupt) as raised:
        Sweep(some("topk"), out=tmp_path, progress=False).fit(source)
    assert str(raised.value) == ""


def test_a_source_that_ends_early_ends_all():
    with pytest.raises(ValueError, match="ended after step 3 of 40"):
        Sweep(some("topk", "relu"), progress=False).fit(torch.randn(64, D) for _ in range(3))


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({}, "a sweep needs an autoencoder"),
        ({"a/b": config("topk")}, "name='a/b' must be"),
        (
            {"a": RunConfig(config("topk"), recipe()), "b": RunConfig(config("topk"), recipe(seed=1))},
            "train.seed is 1 for b and 0 for a: autoencoders on one stream share it",
        ),
    ],
)
def test_members_that_cannot_be_trained_together(configs, message):
    with pytest.raises(ValueError, match=message):
        Sweep(configs)


def test_the_command_with_a_language_model(collected, tmp_path):  # noqa: F811
    """From stored activations to cross-entropy, plot and summary; resumed, it ends with the same."""
    file, out = tmp_path / "sweep.yaml", tmp_path / "sweep"
    variants = [{"architecture": "batchtopk", "name": "nested", "matryoshka": [0.25, 0.75], "k": 6}]
    file.write_text(yaml.safe_dump({
        "activations": str(collected), "architectures": ["topk", "relu"], "k": [3, 6], "l1_weight": [0.05],
        "lr": [1e-3, 5e-3], "autoencoders": variants, "cross_entropy_tokens": 300,
        "autoencoder": {"n": 64, "relu": {"l1_warmup_steps": 5}},
        "train": {"steps": 20, "batch_size": 64, "log_every": 5},
    }))  # fmt: skip
    said = run("sweep", "--config", file, "--out", out)
    results = json.loads((out / "sweep.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert len(rows) == 8 + 2 and results["part"] == "held-out" and results["samples"] > 100
    for name, row in rows.items():
        assert np.isfinite(row["recovered_all_replaced"]) and np.isfinite(row["explained_variance"]), name
        if name.startswith("untrained"):
            best = rows["topk-k6-lr0.005"]["explained_variance"]
            assert row["k"] in (3, 6) and row["explained_variance"] < best
            continue
        sae = softsae.load(out / "autoencoders" / name / "sae", pick_device("auto"))
        held = softsae.activations.as_source(collected / "heldout")
        measured = softsae.evaluate(sae, held.in_order(1024))
        assert row["explained_variance"] == pytest.approx(measured["explained_variance"], abs=1e-9)
        assert row["l0_mean"] == pytest.approx(measured["l0"]["mean"])
        assert row["steps"] == 20 and row["seconds"] > 0 and row["config"]["train"]["lr"] == row["lr"]
    for group in {row["group"] for row in rows.values()}:
        several = [row for row in rows.values() if row["group"] == group]
        (best,) = (row for row in several if row["best"])
        assert best["explained_variance"] == max(row["explained_variance"] for row in several)
    assert rows["nested-lr0.001"]["variant"] == "nested" and rows["relu-w0.05-lr0.001"]["k"] is None
    ce = results["cross_entropy"]
    gap = ce["untouched"]["zero"] - ce["clean"]
    share = (ce["untouched"]["zero"] - rows["nested-lr0.005"]["cross_entropy"]) / gap
    assert rows["nested-lr0.005"]["recovered"] == pytest.approx(share)
    summary = (out / "summary.md").read_text()
    assert said.strip().endswith(summary.strip()) and "![explained variance against L0](frontier.png)" in said
    for name, row in rows.items():
        (line,) = (line for line in summary.splitlines() if line.replace("*", "").startswith(f"| {name} |"))
        assert f"{row['explained_variance']:.4f}" in line and f"{row['recovered']:.4f}" in line
    assert Image.open(out / "frontier.png").size[0] > 1000
    assert run("info", out).strip() == summary.strip()
    before = (out / "sweep.json").read_text()
    run("sweep", "--out", out, "--resume")
    assert (out / "sweep.json").read_text() == before


def test_the_command_on_an_npy_file_without_heldout_part(tmp_path):
    np.save(tmp_path / "x.npy", DATA.numpy())
    arguments = ["--activations", tmp_path / "x.npy", "--autoencoder.n=48", "--train.steps=10"]
    arguments += ["--train.batch_size=64", "--autoencoder.softsae.k_min=2"]
    said = run(
        "sweep", "--out", tmp_path / "s", "--architectures", "[softsae, topk]", "--k", "[3, 5]", *arguments
    )
    assert "no cross-entropy" in said and "on 700 training activations" in said
    rows = json.loads((tmp_path / "s" / "sweep.json").read_text())["rows"]
    assert [row["name"] for row in rows][:2] == ["softsae-k3", "softsae-k5"] and len(rows) == 6
    assert all(row["recovered"] is None for row in rows)
    assert rows[0]["config"]["autoencoder"]["softsae"]["k_min"] == 2


def test_the_command_makes_transcoders(tmp_path):
    np.save(tmp_path / "x.npy", DATA.numpy())
    np.save(tmp_path / "y.npy", DATA[:, :5].square().numpy())
    given = ["--activations", tmp_path / "x.npy", "--target", tmp_path / "y.npy", "--autoencoder.n=48"]
    given += ["--architectures", "[adaptivek, msae]", "--k=4", "--train.steps=10", "--train.batch_size=64"]
    said = run("sweep", "--out", tmp_path / "s", *given)
    assert "they are transcoders" in said and f"x.npy to {tmp_path}/y.npy" in said
    rows = json.loads((tmp_path / "s" / "sweep.json").read_text())["rows"]
    assert [row["config"]["autoencoder"]["d_out"] for row in rows] == [5, 5, 5]
    probe = json.loads((tmp_path / "s" / "autoencoders" / "adaptivek-k4" / "metrics.jsonl").open().readline())
    assert probe["event"] == "prepared"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--architectures", "[topkk]"], "did you mean 'topk'"),
        (["--architectures", "topk", "--autoencoder.relu.l1_weight", "1"], "autoencoder.relu: options"),
        (["--architectures", "topk", "--together", "0"], "together=0"),
        (["--architectures", "topk", "--k", "[1, x]"], "[1.0, 'x']"),
        (["--architectures", "topk", "--autoencoder.d", "7"], "d=7"),
        (["--architectures", "topk", "--autoencoders", "[{architecture: topk, k: 3, name: zero}]"], "'zero'"),
        (
            ["--architectures", "adaptivek", "--autoencoder.adaptivek.scores", "no.npy"],
            "'no.npy' do not exist",
        ),
        (["--resume"], "no run in"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(arguments, message, tmp_path, capsys):
    np.save(tmp_path / "x.npy", DATA.numpy())
    given = [
        "sweep",
        "--out",
        tmp_path / "s",
        "--activations",
        tmp_path / "x.npy",
        "--train.steps=1",
        *arguments,
    ]
    status = main([str(argument) for argument in given])
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("softsae: error: ") and err.count("\n") == 1
    assert message in err and not (tmp_path / "s").exists()


def test_the_frontier_has_a_line_for_each_variant_and_a_panel_for_each_measure(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, file: drawn.append(figure))
    usual = {"best": True, "recovered": 0.9}
    rows = [
        {**usual, "variant": "topk", "l0_mean": l0, "explained_variance": ev, "best": best}
        for l0, ev, best in ((32, 0.8, True), (16, 0.7, True), (33, 0.75, False))
    ]
    rows += [
        {**usual, "variant": "relu", "l0_mean": 20, "explained_variance": 0.72},
        {**usual, "variant": "gated", "l0_mean": 0.1, "explained_variance": -0.5},
        {**usual, "variant": "gone", "l0_mean": None, "explained_variance": None, "recovered": None},
        {**usual, "variant": "untrained", "l0_mean": 32, "explained_variance": 0.2},
    ]
    plots.frontier(tmp_path / "f.png", rows)
    left, right = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines["topk"] == [[16, 0.7], [32, 0.8]] and lines["relu"] == [[20, 0.72]] and lines["gone"] == []
    assert left.collections[0].get_offsets().tolist() == [[33, 0.75]]
    assert left.get_xscale() == "log" and right.get_ylabel() == "cross-entropy recovered"
    assert left.get_ylim()[0] > 0.5 and left.get_xlim()[0] > 10  # what collapsed does not set the scale
    plots.frontier(tmp_path / "f.png", [{**row, "recovered": None} for row in rows])
    assert len(drawn[1].axes) == 1
