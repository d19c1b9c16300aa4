"""Configurations: refused by name and value; the two modes."""

from __future__ import annotations

import pytest

from softsae import EstimatorConfig, RunConfig, SoftSAEConfig, TrainConfig, corrected, published
from softsae.config import difference, resolve
from tests.softsae.configs import model


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"d": 0}, "d=0 must be an integer >= 1"),
        ({"n": 2.5}, "n=2.5"),
        ({"k": 0}, "k=0 must be a number > 0"),
        ({"k": 5000.0}, "k=5000.0 must be a number > 0 and <= 4096"),
        ({"k": float("nan")}, "k=nan"),
        ({"k_max": 30.0}, "k_max=30.0 must exceed the target k=32"),
        ({"k": 4096.0}, "k=4096.0 must be below n=4096"),
        ({"k_min": 40}, "k_min=40 exceeds k=32"),
        ({"alpha": 0.0}, "alpha=0.0 must be a number > 0"),
        ({"architecture": "softase"}, "architecture='softase' must be one of .*; did you mean 'softsae'"),
        ({"selection_gradient": "some"}, "selection_gradient='some' must be 'k', 'all' or a number"),
        ({"selection_gradient": -1.0}, "selection_gradient=-1.0"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"normalization": "layer"}, "normalization='layer'"),
        ({"matryoshka": [1.0]}, r"matryoshka=\[1.0\] must list two shares or more"),
        ({"matryoshka": [0.5, 0.4]}, "must sum to 1, not 0.9"),
        ({"matryoshka": [1e-5, 1 - 1e-5]}, "leaves a group of the 4096 latents empty"),
    ],
)
def test_autoencoder_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        model(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"lr": -1e-3}, "lr=-0.001"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"steps": 100, "hard_steps": 101}, "hard_steps=101 must be an integer >= 0 and <= 100"),
        ({"steps": 100, "warmup_steps": -1}, "warmup_steps=-1"),
        ({"decay_from": 1.5}, "decay_from=1.5"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0"),
        ({"clip": "none"}, "clip='none'"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"hard_phase": "encoder"}, "hard_phase='encoder'"),
        ({"dead_after": 0}, "dead_after=0"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"mode": "original"}, "mode='original'"),
        ({"log_every": 0}, "log_every=0"),
        ({"count_logged_twice": 1}, "count_logged_twice=1"),
    ],
)
def test_train_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_estimator_fields():
    with pytest.raises(ValueError, match="estimator.kind='deep'"):
        EstimatorConfig(kind="deep")
    with pytest.raises(ValueError, match="estimator.width=0"):
        EstimatorConfig(width=0)


def test_contradictions_between_parts():
    with pytest.raises(ValueError, match="d=8 in the configuration, but the activations have d=9"):
        resolve(corrected(d=8), 9)
    with pytest.raises(ValueError, match="alpha_start=0.01 is below the final alpha=0.1"):
        resolve(RunConfig(model(alpha=0.1), TrainConfig(alpha_start=0.01)), 8)


def test_options_of_another_architecture_are_refused():
    with pytest.raises(ValueError, match="softsae: options are given, but the architecture is 'topk'"):
        model(architecture="topk", alpha=0.5)


def test_the_corrected_recipe():
    config = resolve(corrected(n=2**14, k=32.0), 512)
    autoencoder, train = config.autoencoder, config.train
    rule = autoencoder.softsae
    assert (rule.selection_gradient, rule.rounding) == ("k", "nearest")
    assert autoencoder.normalization == "unit_mean_square"
    assert (train.clip, train.estimator_lr_multiplier, train.hard_phase) == ("separate", 5.0, "all")
    assert (train.lr, train.budget_weight, train.alpha_start) == (5e-4, 16.0, 1e-4)
    assert train.k_anneal_steps == 0
    assert rule.k_max == 64 and rule.estimator.dtype == "float32"
    small = resolve(corrected(softsae=SoftSAEConfig(estimator=EstimatorConfig("bottleneck"))), 512)
    assert small.train.estimator_lr_multiplier == 1.0


def test_the_published_recipe():
    config = resolve(published(n=2**14, k=80.0), 2304)
    autoencoder, train = config.autoencoder, config.train
    assert (autoencoder.softsae.selection_gradient, autoencoder.softsae.rounding) == ("all", "floor")
    assert autoencoder.normalization == "unit_mean_norm"
    assert (train.clip, train.estimator_lr_multiplier, train.hard_phase) == ("global", 1.0, "decoder")
    assert (train.lr, train.budget_weight, train.alpha_start) == (2e-4, 1.0, 1.0)
    assert (train.k_anneal_steps, train.hard_steps, train.count_logged_twice) == (2441, 10_000, True)
    estimator = autoencoder.softsae.estimator
    assert (estimator.init, estimator.dtype, estimator.moves_b_dec) == ("random", "bfloat16", True)


def test_a_named_value_wins_over_the_mode():
    config = RunConfig(
        model(selection_gradient=0.5, rounding="nearest"),
        TrainConfig(mode="published", clip="separate", budget_weight=0.0, hard_steps=0),
    )
    resolved = resolve(config, 64)
    rule, train = resolved.autoencoder.softsae, resolved.train
    assert (rule.selection_gradient, rule.rounding) == (0.5, "nearest")
    assert (train.clip, train.budget_weight, train.hard_steps) == ("separate", 0.0, 0)
    assert resolve(resolved, 64) == resolved


def test_difference_names_the_field_and_both_values():
    a, b = {"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}}
    assert difference(a, b) == "x.z: 2 and 3"
    assert difference(a, a) is None
    assert difference({}, {"new": 1}) == "new: None and 1"
