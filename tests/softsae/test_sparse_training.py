"""Sparse trainings: missing room, the choice of the path, going on, steps with numbers on the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from softsae import AutoencoderConfig, SoftSAEConfig, TrainConfig, Trainer
from softsae.graph import Recorder
from softsae.path import CHECK, LAG, PathChoice
from softsae.sparse import places
from tests.softsae.sparse_cases import CASES, SOURCE, Exactly, K, N, records, trainer


def state(run: Trainer):
    yield from run.sae.state_dict().items()
    yield from run.dead.state_dict().items()
    for index, values in run.optimizer.state_dict()["state"].items():
        yield from ((f"{index}.{name}", value) for name, value in values.items())


@pytest.mark.parametrize("name", ["softsae-wide", "batchtopk"])
def test_a_row_without_room_skips_the_step_until_there_is_more(name):
    """A scale of 0.2 keeps far more latents active than the budget says; BatchTopK's rows are given 8."""
    model, own = CASES[name]
    if name == "softsae-wide":
        model = dataclasses.replace(model, softsae=SoftSAEConfig(alpha=0.2))
    seen: dict[int, tuple] = {}

    def watch(run, record):
        seen[record["step"]] = run.sae.W_enc.clone(), run.dead.silent_for.clone(), record

    train = TrainConfig(**own, steps=48, batch_size=64, lr=2e-3, log_every=1, device="cpu", path="sparse")
    run = Trainer(model, train, callbacks=[watch], progress=False)
    if name == "batchtopk":
        make_room = PathChoice.__init__

        def narrow(self, *args):
            make_room(self, *args)
            self.max_active = 8

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PathChoice, "__init__", narrow)
            run.fit(SOURCE)
    else:
        run.fit(SOURCE)
    first, raised = seen[1][2], seen[CHECK + 1][2]
    assert first["skipped_steps"] == 1 and seen[CHECK][2]["skipped_steps"] == CHECK
    for step in range(2, CHECK + 1):
        assert torch.equal(seen[step][0], seen[1][0]), step
    assert raised["max_active"] > first["max_active"]
    assert not torch.equal(seen[CHECK + 1][0], seen[CHECK][0])
    assert seen[48][2]["skipped_steps"] == CHECK  # there is room, and no step is skipped any more
    steps = {int(values["step"]) for values in run.optimizer.state.values()}
    assert steps == {48 - CHECK}
    assert seen[48][2]["loss_reconstruction"] < seen[CHECK + 1][2]["loss_reconstruction"]


def test_while_the_scale_is_annealed_the_path_is_dense_and_then_sparse():
    annealed = {"alpha_start": 1.0, "alpha_anneal_steps": 30}
    train = {"steps": 64, "hard_steps": 0, "path": "auto", "sparse_below": 0.2}
    CASES["annealed"] = AutoencoderConfig(n=N, k=K, softsae=SoftSAEConfig(alpha=1e-3)), annealed
    try:
        run, found = records("annealed", Trainer, **train)
    finally:
        del CASES["annealed"]
    by_path = [record["path"] for record in found]
    turned = by_path.index("sparse")
    assert turned % CHECK == 0 and turned >= 32
    assert by_path == ["dense"] * turned + ["sparse"] * (64 - turned)
    assert found[turned - LAG]["l0"] <= 0.2 * N < found[0]["l0"]
    assert found[-1]["skipped_steps"] == 0
    assert run.path.max_active >= places(2 * K)


def test_auto_starts_sparse_where_few_are_active_and_returns_when_many_are():
    train = {"steps": 40, "hard_steps": 0, "path": "auto"}
    _, few = records("topk", sparse_below=0.05, **train)
    assert {record["path"] for record in few} == {"sparse"}
    _, many = records("topk", sparse_below=0.02, **train)
    assert {record["path"] for record in many} == {"dense"}
    CASES["wide"] = AutoencoderConfig(n=N, k=K, softsae=SoftSAEConfig(alpha=0.2)), {}
    try:
        _, found = records("wide", Trainer, sparse_below=0.05, **train)
    finally:
        del CASES["wide"]
    by_path = [record["path"] for record in found]
    assert by_path == ["sparse"] * CHECK + ["dense"] * (40 - CHECK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["softsae-wide", "batchtopk", "softsae-shared-scaled"])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, name, dtype):
    """At step 14 a measurement is on its way to the host, at 37 the path and the list are settled."""
    train = {"path": "auto", "sparse_below": 0.1, "dtype": dtype, "dead_after": 100}
    x = SOURCE.sample(900, seed=9)[0]
    whole = trainer(name, tmp_path / "whole", **train)
    whole.fit(x)
    out = tmp_path / "parts"

    def stop(at):
        def callback(run, record):
            if record["step"] == at:
                raise KeyboardInterrupt

        return callback

    for step in (14, 37):
        with pytest.raises(KeyboardInterrupt, match=f"after step {step} of 60"):
            trainer(name, out, [stop(step)], **train).fit(x)
    last = trainer(name, out, **train)
    last.fit(x)
    assert whole.dead.listed.any()  # AuxK took part
    for (key, a), (_, b) in zip(state(whole), state(last), strict=True):
        assert torch.equal(a, b), key
    assert last.path.state() == whole.path.state() and last.dead.state() == whole.dead.state()


def test_a_training_may_go_on_by_another_path(tmp_path):
    def stop(run, record):
        if record["step"] == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer("topk", tmp_path, [stop], path="dense").fit(SOURCE)
    found = []
    other = trainer("topk", tmp_path, [lambda run, record: found.append(record)], path="sparse")
    other.fit(SOURCE)
    assert [record["step"] for record in found] == list(range(31, 61))
    assert {record["path"] for record in found} == {"sparse"}
    whole, _ = records("topk", path="dense")
    torch.testing.assert_close(other.sae.W_enc, whole.sae.W_enc, rtol=0, atol=1e-3)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["softsae-wide", "topk-nested", "adaptivek", "batchtopk"])
def test_steps_with_their_numbers_on_the_device_are_the_same(name, path, monkeypatch):
    """What a graph records, run as it is: lr, alpha, k_target and weights are 0-d tensors."""
    train = {"path": path, "steps": 40, "hard_steps": 4, "rows_at_a_time": 24}
    _, expected = records(name, Exactly, **train)

    def recorder(self, source, held_out=None, start=Trainer.start):
        start(self, source, held_out)
        self.run_step = Recorder(self.one_step, self.device, stream=None)

    monkeypatch.setattr(Trainer, "start", recorder)
    _, found = records(name, Exactly, **train)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "loss_reconstruction", "grad_norm", "k_hat_mean", "lr", "alpha"):
            if theirs[key] is not None:
                assert ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-6), (ours["step"], key)
