"""Recipes: every file loads, names its sources and trains; wrong keys of any file are refused by name."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import yaml

import softsae
from softsae import RunConfig, Trainer, recipes
from softsae.architectures import ARCHITECTURES
from softsae.config import resolve, shortened
from softsae.demo import ON_CPU
from softsae.keys import build, keys_of
from tests.softsae.command import run

NAMES = recipes.names()


@pytest.fixture
def activations(tmp_path):
    x = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return tmp_path / "x.npy"


def test_there_is_one_for_every_architecture_of_this_package():
    assert {"softsae-gemma2-2b", "softsae-clip-vit-b16", "smollm2-135m", "matryoshka-batchtopk"} <= set(NAMES)
    assert {softsae.recipe(name).autoencoder.architecture for name in NAMES} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_its_source_beside_it(name):
    first, *lines = recipes.file_of(name).read_text().splitlines()
    assert re.fullmatch(r"# \S.{20,100}", first)
    for line in lines:
        assert re.fullmatch(r"\s*\w+:|\s*\w+: \S.*  # \S.{3,}", line), line
        assert len(line) <= 110


@pytest.mark.parametrize("name", NAMES)
def test_resolves_and_trains_when_scaled_down(name):
    config = softsae.recipe(name)
    whole = resolve(config, 768)
    given = yaml.safe_load(recipes.file_of(name).read_text())

    def agrees(found, values):
        for key, value in values.items():
            if isinstance(value, dict):
                agrees(getattr(found, key), value)
            elif value is not None:
                assert getattr(found, key) == value, key

    agrees(whole, given)
    section = config.autoencoder.section
    if hasattr(section, "k_max"):
        section = dataclasses.replace(section, k_max=None)
    small = dataclasses.replace(config.autoencoder.with_section(section), n=64, k=6.0)
    train = dataclasses.replace(shortened(config.train, 3), batch_size=32, device="cpu")
    sae = Trainer(RunConfig(small, train), progress=False).fit(torch.randn(200, 8))
    assert sae(torch.randn(5, 8)).x_hat.isfinite().all()


def test_the_rivals_are_trained_like_the_recipe_that_they_are_compared_with():
    ours = softsae.recipe("softsae-gemma2-2b")
    for name in NAMES:
        if (
            not recipes.file_of(name)
            .read_text()
            .partition("\n")[0]
            .endswith("compared with softsae-gemma2-2b")
        ):
            continue
        theirs = softsae.recipe(name)
        for field in ("n", "k", "normalization"):
            assert getattr(theirs.autoencoder, field) == getattr(ours.autoencoder, field), (name, field)
        for field in ("steps", "batch_size", "decay_from", "dead_after"):
            assert getattr(theirs.train, field) == getattr(ours.train, field), (name, field)


def test_the_demo_follows_its_recipe():
    config = softsae.recipe("smollm2-135m")
    train = config.train
    assert (ON_CPU.n, ON_CPU.steps, ON_CPU.batch_size, ON_CPU.lr) == (
        config.autoencoder.n, train.steps, train.batch_size, train.lr
    )  # fmt: skip
    demo = softsae.SoftSAEConfig(estimator=softsae.EstimatorConfig(kind="bottleneck"))
    plain = RunConfig(
        softsae.AutoencoderConfig(n=ON_CPU.n, k=32.0, softsae=demo),
        softsae.TrainConfig(steps=ON_CPU.steps, batch_size=ON_CPU.batch_size, lr=ON_CPU.lr),
    )
    assert resolve(config, 576) == resolve(plain, 576)


def test_listed_and_printed():
    said = run("recipes")[0]
    assert [line.split()[0] for line in said.splitlines()] == NAMES
    assert all(len(line.split()) > 5 for line in said.splitlines())
    assert run("recipes", "jumprelu")[0] == recipes.file_of("jumprelu").read_text()
    assert "did you mean 'jumprelu'?" in run("recipes", "jumpreul", status=2)[1]
    with pytest.raises(ValueError, match="recipe='topkk' must be one of .*; did you mean 'topk'"):
        softsae.recipe("topkk")


def test_later_options_win_over_a_recipe(activations, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 40, lr: 3.0e-3}\nautoencoder: {n: 48}")
    scale = ["--autoencoder.k", 6, "--train.warmup_steps", 2, "--train.batch_size", 16, "--train.steps", 7]
    out = tmp_path / "run"
    run("train", "--config", file, *scale, "--recipe", "jumprelu", "--activations", activations, "--out", out)
    config = json.loads((out / "config.json").read_text())
    autoencoder, train = config["autoencoder"], config["train"]
    assert (autoencoder["architecture"], autoencoder["n"], autoencoder["k"]) == ("jumprelu", 48, 6.0)
    assert (train["steps"], train["lr"], train["adam_beta1"], train["warmup_steps"]) == (7, 3e-3, 0.0, 2)
    assert autoencoder["jumprelu"]["bandwidth"] == 0.001
    run("train", "--resume", "--out", out)  # the options that were saved, not the recipe's once more
    assert json.loads((out / "config.json").read_text()) == config
    file.write_text("recipe: topk\ntrain: {steps: 5, batch_size: 16, warmup_steps: 1}")
    run("train", "--config", file, "--autoencoder.n=32", "--autoencoder.k=4", "--activations", activations,
        "--out", tmp_path / "named")  # fmt: skip
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    assert config["autoencoder"]["architecture"] == "topk" and config["train"]["lr"] == 2e-4


def test_quick_shortens_the_phases_of_a_recipe(activations, tmp_path):
    small = [
        "--autoencoder.n=64",
        "--autoencoder.k=6",
        "--autoencoder.softsae.k_max=12",
        "--train.batch_size=8",
    ]
    run("train", "--recipe", "softsae-gemma2-2b", "--quick", *small, "--activations", activations,
        "--out", tmp_path / "run")  # fmt: skip
    train = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (train["steps"], train["hard_steps"], train["k_anneal_steps"]) == (200, 8, 2)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "autoencoder: {msae: {weigthing: reverse}}",
            "autoencoder.msae.weigthing is not an option; did you mean autoencoder.msae.weighting?",
        ),
        ("autoencoder: {adaptivek: {rigde: 1}}", "did you mean autoencoder.adaptivek.ridge?"),
        ("train: {regularizer: {r1_wieght: 1}}", "did you mean train.regularizer.r1_weight?"),
        ("autoencoder: {option: {groups: 4}}", "did you mean autoencoder.options?"),
        ("autoencoder: {options: {groups: 4}}", "they are for registered architectures, 'softsae' is built"),
        ("plugins: x.py", "plugins is not an option; did you mean plugin?"),
        (
            "autoencoder: {bandwith: 0.1}",
            "autoencoder.bandwith is not an option; did you mean autoencoder.jumprelu.bandwidth?",
        ),
        ("train: {step: 3}", "train.step is not an option; did you mean train.steps?"),
        ("trian: {steps: 3}", "trian is not an option; did you mean train?"),
        ("autoencoder: {relu: {l1_wieght: 1}}", "did you mean autoencoder.relu.l1_weight?"),
        ("autoencoder: {gated: {l1_wieght: 1}}", "did you mean autoencoder.gated.l1_weight?"),
        ("zzz: 1", "zzz is not an option"),
        ("train: 3", "train must hold options by name, not 3"),
        ("train: [3", "is not a YAML file: "),
        ("autoencoder: {softsae: {k_max: 3}}", "k_max=3.0 must exceed the target k=32"),
        ("train: {steps: 10, hard_steps: 11}", "hard_steps=11 must be an integer >= 0 and <= 10"),
        ("autoencoder: {jumprelu: {bandwidth: 0.1}}", "jumprelu: options are given, but the architecture is"),
    ],
)
def test_files_that_contradict_or_misspell_are_refused_with_their_name(text, message, activations, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    out = tmp_path / "run"
    said = run("train", "--config", file, "--activations", activations, "--out", out, status=2)[1]
    assert message in said and str(file) in said and said.count("\n") == 1, said
    assert not out.exists()


def test_misspelt_options_on_the_command_line(activations, tmp_path):
    given = ["--activations", activations, "--out", tmp_path / "run"]
    said = run("train", *given, "--autoencoder.bandwith=3", status=2)[1]
    assert "--autoencoder.bandwith is not an option; did you mean --autoencoder.jumprelu.bandwidth?" in said
    assert "did you mean --quick?" in run("train", *given, "--quik", status=2)[1]
    assert "did you mean 'relu'?" in run("train", *given, "--recipe", "rellu", status=2)[1]
    assert "did you mean --tokens?" in run("collect", "--out", tmp_path / "c", "--token", 3, status=2)[1]


def test_build_names_the_file_and_takes_nested_sections():
    made = build(RunConfig, {"autoencoder": {"softsae": {"estimator": {"kind": "linear"}}}}, "f.yaml")
    assert made.autoencoder.softsae.estimator.kind == "linear" and made.train == softsae.TrainConfig()
    with pytest.raises(ValueError, match="f.yaml: estimator.kind='deep'"):
        build(RunConfig, {"autoencoder": {"softsae": {"estimator": {"kind": "deep"}}}}, "f.yaml")
    with pytest.raises(ValueError, match="f.yaml: train.stepz is not an option; did you mean train.steps"):
        build(RunConfig, {"train": {"stepz": 1}}, "f.yaml")
    assert {"autoencoder", "autoencoder.softsae.estimator.kind", "train.lr"} <= keys_of(RunConfig).keys()
    assert set(ARCHITECTURES) - {"topk"} <= {key.rpartition(".")[2] for key in keys_of(RunConfig)}
