"""Training on a small problem: it learns, it resumes bit for bit, it stops and refuses as it should."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch

import softsae
from softsae import AutoencoderConfig, EstimatorConfig, TrainConfig, Trainer
from softsae.activations.synthetic import SyntheticSource
from softsae.trainer import NonFiniteActivations
from tests.softsae.configs import model

D, N = 16, 48
SOURCE = SyntheticSource(D, 32, 1, 6)


def config(**fields) -> AutoencoderConfig:
    return model(**{"n": N, "k": 3.5, **fields})


def recipe(**fields) -> TrainConfig:
    return TrainConfig(
        **{"steps": 40, "batch_size": 64, "lr": 2e-3, "log_every": 5, "device": "cpu", **fields}
    )


def trainer(out=None, callbacks=(), train=None, **fields) -> Trainer:
    return Trainer(config(**fields), recipe(**(train or {})), out=out, callbacks=callbacks, progress=False)


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["wide", "bottleneck"])
def test_loss_falls_and_mean_k_hat_reaches_its_target(kind, tmp_path):
    run = trainer(tmp_path, train={"steps": 300, "lr": 5e-3}, estimator=EstimatorConfig(kind, 16))
    sae = run.fit(SOURCE, held_out=SOURCE.sample(2000, seed=5)[0])
    records = lines(tmp_path)
    train = [r for r in records if "event" not in r]
    assert train[-1]["loss_reconstruction"] < 0.4 * train[0]["loss_reconstruction"]
    result = records[-1]
    assert result["event"] == "eval" and result["step"] == 300
    assert abs(result["k_hat"]["mean"] - 3.5) < 0.5
    assert result["k_hat"]["sd"] > 0.5
    assert result["explained_variance"] > 0.7
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    torch.testing.assert_close(
        softsae.load(tmp_path / "sae")(torch.ones(1, D)).x_hat, sae(torch.ones(1, D)).x_hat
    )


def test_metrics_have_what_the_run_is_judged_by(tmp_path):
    trainer(tmp_path, train={"hard_steps": 10, "k_anneal_steps": 20}).fit(SOURCE)
    records = lines(tmp_path)
    assert [r["step"] for r in records] == list(range(5, 45, 5))
    needed = {
        "loss", "loss_reconstruction", "loss_budget", "explained_variance", "l0", "k_hat_mean", "k_hat_sd",
        "k_target", "alpha", "lr", "dead_latents", "grad_norm", "estimator_grad_norm", "samples_per_second",
    }  # fmt: skip
    assert needed <= records[0].keys()
    assert records[0]["k_target"] > 10 and records[-1]["k_target"] == 3.5
    assert [r["hard"] for r in records] == [False] * 6 + [True] * 2
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["autoencoder"]["d"] == D and saved["train"]["hard_steps"] == 10


class Stop:
    """A callback that interrupts at a step, as Ctrl-C does."""

    def __init__(self, step, how):
        self.step, self.how = step, how

    def __call__(self, trainer, record):
        if record["step"] == self.step:
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise KeyboardInterrupt


def states(run):
    adam = run.optimizer.state_dict()["state"]
    yield from run.sae.state_dict().items()
    yield from run.dead.state_dict().items()
    for index, state in adam.items():
        yield from ((f"{index}.{name}", value) for name, value in state.items())


@pytest.mark.parametrize("how", ["signal", "exception"])
@pytest.mark.parametrize("architecture", ["softsae", "topk"])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, how, architecture):
    train = {"dead_after": 60, "hard_steps": 10}
    x = SOURCE.sample(700, seed=9)[0]
    handler = signal.getsignal(signal.SIGINT)  # ignored, where the tests were started in the background
    whole = trainer(tmp_path / "whole", train=train, architecture=architecture)
    whole.fit(x)
    out = tmp_path / "parts"
    for stop in (10, 25):
        with pytest.raises(KeyboardInterrupt, match=f"interrupted after step {stop} of 40; .*out="):
            trainer(out, [Stop(stop, how)], train, architecture=architecture).fit(x)
        assert signal.getsignal(signal.SIGINT) is handler
    last = trainer(out, train=train, architecture=architecture)
    last.fit(x)
    assert whole.dead.listed.any()  # AuxK took part
    for (name, a), (_, b) in zip(states(whole), states(last), strict=True):
        assert torch.equal(a, b), name
    timeless = [
        [{k: v for k, v in r.items() if k != "samples_per_second"} for r in lines(folder)]
        for folder in (tmp_path / "whole", out)
    ]
    assert timeless[0] == timeless[1]


def test_interruption_without_a_folder_says_that_nothing_is_saved():
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 5 of 40; nothing was saved"):
        trainer(callbacks=[Stop(5, "exception")]).fit(SOURCE)


def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path):
    def crash(run, record):
        if record["step"] == 30:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        trainer(tmp_path, [crash], {"checkpoint_every": 12}).fit(SOURCE)
    steps = []
    again = trainer(tmp_path, [lambda run, record: steps.append(record["step"])], {"checkpoint_every": 12})
    again.fit(SOURCE)
    assert steps == [25, 30, 35, 40]
    assert [r["step"] for r in lines(tmp_path)] == list(range(5, 45, 5))
    whole = trainer()
    whole.fit(SOURCE)
    assert torch.equal(whole.sae.W_enc, again.sae.W_enc)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = trainer(tmp_path).fit(SOURCE)
    steps = []
    second = trainer(tmp_path, [lambda run, record: steps.append(record)]).fit(SOURCE)
    assert steps == [] and torch.equal(first.W_dec, second.W_dec)


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    trainer(tmp_path).fit(SOURCE)
    with pytest.raises(ValueError, match=r"differ in autoencoder.k: 3.5 and 3.0"):
        trainer(tmp_path, k=3.0).fit(SOURCE)
    with pytest.raises(ValueError, match=r"differ in train.lr: 0.002 and 0.1"):
        trainer(tmp_path, train={"lr": 0.1}).fit(SOURCE)
    trainer(tmp_path, train={"log_every": 7}).fit(SOURCE)  # changes no result


def test_damaged_checkpoint_is_refused(tmp_path):
    trainer(tmp_path).fit(SOURCE)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint.safetensors cannot be read"):
        trainer(tmp_path).fit(SOURCE)


def test_nonfinite_activations_are_refused_with_their_position():
    x = SOURCE.sample(40 * 64, seed=0)[0]
    x[64 * 30 + 7, 3] = float("nan")
    x[64 * 30 + 9, 0] = float("inf")
    with pytest.raises(NonFiniteActivations, match="batch 30, rows 7, 9; nonfinite='skip'"):
        trainer().fit(iter(x.split(64)))


def test_nonfinite_activations_are_skipped_and_reported(tmp_path):
    x = SOURCE.sample(41 * 64, seed=0)[0]
    x[64 * 2 + 7, 3] = float("nan")
    x[64 * 5 : 64 * 6] = float("inf")
    sae = trainer(tmp_path, train={"nonfinite": "skip"}).fit(iter(x.split(64)))
    found = [(r["batch"], r["rows"]) for r in lines(tmp_path) if r.get("event") == "nonfinite"]
    assert found == [(2, [7]), (5, list(range(64)))]
    assert all(value.isfinite().all() for value in sae.state_dict().values())


def test_source_that_ends_early():
    with pytest.raises(ValueError, match="ended after step 3 of 40"):
        trainer().fit(torch.randn(64, D) for _ in range(3))


def test_wrong_sources_and_devices():
    with pytest.raises(TypeError, match="not int"):
        trainer().fit(3)
    with pytest.raises(ValueError, match="d=8 in the configuration, but the activations have d=16"):
        trainer(d=8).fit(SOURCE)
    with pytest.raises(ValueError, match="device='cuda:99' cannot be used"):
        trainer(train={"device": "cuda:99"}).fit(SOURCE)


def test_published_mode_trains_only_the_decoder_in_the_hard_phase():
    seen = {}

    def keep(run, record):
        state = {name: value.clone() for name, value in run.sae.state_dict().items()}
        seen[record["step"]] = state

    train = {"mode": "published", "hard_steps": 20, "dead_after": 10**6}
    trainer(callbacks=[keep], train=train).fit(SOURCE)
    for name, value in seen[20].items():
        moved = not torch.equal(value, seen[40][name])
        assert moved == (name in ("W_dec", "b_dec")), name


def test_estimator_has_its_own_clip_and_learning_rate():
    run = trainer(train={"steps": 1, "warmup_steps": 0, "decay_from": 1.0, "estimator_lr_multiplier": 3.0})
    run.fit(SOURCE)
    own, estimator = run.optimizer.param_groups
    assert estimator["lr"] == pytest.approx(3 * own["lr"])
    assert {id(p) for p in estimator["params"]} == {id(p) for p in run.sae.selector.parameters()}
    for clip, names in (("separate", {"grad_norm", "estimator_grad_norm"}), ("global", {"grad_norm"})):
        run.config.train.clip = clip
        for p in run.sae.parameters():
            p.grad = torch.full_like(p, 1.0)
        scales, found = run.one_step.clip({})
        assert found.keys() == names
        norms = [math.hypot(*(p.grad.norm().item() for p in g["params"])) for g in (own, estimator)]
        scales = scales if clip == "separate" else (scales, scales)
        norms = [norm * scale.item() for norm, scale in zip(norms, scales, strict=True)]
        if clip == "separate":
            assert norms == pytest.approx([1.0, 1.0], abs=1e-4)
        else:
            assert math.hypot(*norms) == pytest.approx(1.0, abs=1e-4)


def test_fitting_again_starts_again():
    run = trainer()
    first = run.fit(SOURCE)
    assert torch.equal(run.fit(SOURCE).W_enc, first.W_enc)


def test_global_random_state_of_the_caller_is_not_used():
    torch.manual_seed(1)
    a = trainer().fit(SOURCE)
    torch.manual_seed(2)
    b = trainer().fit(SOURCE)
    assert torch.equal(a.W_enc, b.W_enc)


def test_bfloat16_products_keep_float32_parameters():
    sae = trainer(train={"dtype": "bfloat16"}).fit(SOURCE)
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert softsae.evaluate(sae, [SOURCE.sample(500, 3)[0]])["explained_variance"] > 0.2
