"""From the options of a sweep to its members, their names, and the controls beside them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import softsae
from softsae import TrainConfig
from softsae.activations import as_source
from softsae.architectures import ARCHITECTURES
from softsae.options import SharedConfig, SweepOptions
from softsae.selectors.topk import TopK
from softsae.sweep_command import controls
from softsae.variants import members

D = 16


def options(**fields) -> SweepOptions:
    return SweepOptions(out="out", activations="x", **fields)


def test_members_are_the_product_with_readable_names():
    shared = SharedConfig(n=256, softsae=softsae.SoftSAEConfig(k_min=2.0), relu=softsae.ReLUConfig(0.1, 7))
    nested = {"architecture": "batchtopk", "name": "nested", "matryoshka": [0.25, 0.75], "k": 8}
    made = members(
        options(
            architectures=["softsae", "topk", "relu"], k=[8, 16], l1_weight=[0.03], lr=[1e-3, 2e-3],
            autoencoders=[nested, {"architecture": "softsae", "name": "far", "softsae": {"k_max": 60},
                                   "train": {"lr": 5e-3, "clip": "global"}}], autoencoder=shared,
        ),
        TrainConfig(steps=50),
    )  # fmt: skip
    assert list(made) == [
        "softsae-k8-lr0.001", "softsae-k8-lr0.002", "softsae-k16-lr0.001", "softsae-k16-lr0.002",
        "topk-k8-lr0.001", "topk-k8-lr0.002", "topk-k16-lr0.001", "topk-k16-lr0.002",
        "relu-w0.03-lr0.001", "relu-w0.03-lr0.002", "nested-lr0.001", "nested-lr0.002", "far-k8", "far-k16",
    ]  # fmt: skip
    assert {m.group for name, m in made.items() if name.startswith("softsae-k8")} == {"softsae-k8"}
    config, train = made["far-k16"].config.autoencoder, made["far-k16"].config.train
    assert (config.k, config.softsae.k_max, config.softsae.k_min) == (16, 60, 2.0)
    assert (train.lr, train.clip, train.steps) == (5e-3, "global", 50) and made["far-k16"].variant == "far"
    relu = made["relu-w0.03-lr0.002"].config.autoencoder
    assert (relu.relu.l1_weight, relu.relu.l1_warmup_steps, relu.n) == (0.03, 7, 256)
    assert made["nested-lr0.001"].config.autoencoder.matryoshka == [0.25, 0.75]
    alone = members(options(architectures="topk", autoencoder=SharedConfig(k=5.0)), TrainConfig())
    assert list(alone) == ["topk-k5"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "--architectures is needed"),
        ({"architectures": ["topkk"]}, "architectures='topkk' must be one of .*did you mean 'topk'"),
        ({"architectures": ["topk", "topk"]}, "two autoencoders of the sweep are called 'topk-k32'"),
        ({"architectures": ["topk"], "k": [5000]}, "topk: k=5000 must be a number"),
        ({"architectures": ["topk"], "lr": [-1.0]}, "lr=-1.0 must be a number"),
        ({"architectures": ["topk"], "l1_weight": [0.1]}, r"l1_weight=\[0.1\] does not set the L0 of any"),
        (
            {"architectures": ["relu", "gated"], "k": [8]},
            r"k=\[8\] does not set the L0 of any of relu, gated",
        ),
        (
            {"architectures": ["topk"], "k": [8], "autoencoder": SharedConfig(k=9)},
            "autoencoder.k=9: give one",
        ),
        ({"architectures": ["topk"], "autoencoder": SharedConfig(architecture="relu")}, "--architectures"),
        (
            {"architectures": ["topk"], "autoencoder": SharedConfig(jumprelu=softsae.JumpReLUConfig(0.5))},
            "autoencoder.jumprelu: options are given, but the architectures are topk",
        ),
        ({"autoencoders": [{"k": 3}]}, r"autoencoders\[0\]=.* needs an architecture"),
        (
            {"autoencoders": [{"architecture": "topk", "latents": 3, "K": 3}]},
            r"autoencoders\[0\].latents is not an option",
        ),
        (
            {"autoencoders": [{"architecture": "relu", "relu": {"l1_wieght": 3}}]},
            "relu.relu.l1_wieght is not an option; did you mean relu.relu.l1_weight",
        ),
        (
            {"autoencoders": [{"architecture": "topk", "train": {"step": 3}}]},
            "topk.train.step is not an option; did you mean topk.train.steps",
        ),
        ({"architectures": ["topk"], "autoencoder": SharedConfig(options={"a": 1})}, "autoencoder.options: "),
        ({"autoencoders": [{"architecture": "relu", "relu": 3}]}, "relu=3 must be options by name"),
        ({"autoencoders": [{"architecture": "topk", "relu": {"l1_weight": 3}}]}, "architecture is 'topk'"),
    ],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        members(options(**fields), TrainConfig())


def test_controls_have_the_size_of_what_they_are_beside():
    wide = {"architecture": "batchtopk", "name": "wide", "n": 256, "k": 80}
    asked = options(architectures="topk", k=[8.0], autoencoders=[wide], autoencoder=SharedConfig(n=64))
    found = controls(asked, members(asked, TrainConfig()), as_source(torch.zeros(4, D)))
    assert {name: (c.n, c.k, c.d, c.architecture) for name, c in found.items()} == {
        "untrained-k8": (64, 8.0, D, "topk"),
        "untrained-k80": (256, 80, D, "topk"),
    }


@dataclass
class Mine(softsae.Section):
    size: int = 2
    share: float = 0.5


def test_variants_of_registered_architectures_share_their_options(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "mine", (Mine, TopK))
    other = {"architecture": "mine", "name": "other", "options": {"share": 0.1}}
    shared = SharedConfig(n=64, options={"size": 3})
    made = members(
        options(architectures=["mine", "topk"], autoencoders=[other], autoencoder=shared), TrainConfig()
    )
    found = {name: member.config.autoencoder.options for name, member in made.items()}
    assert found == {"mine-k32": Mine(3), "topk-k32": None, "other-k32": Mine(3, 0.1)}
