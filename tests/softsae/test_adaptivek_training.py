"""AdaptiveK in training: the probe fitted, frozen, then moved; interrupted runs; kinds of source."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import softsae
from softsae import TrainConfig, Trainer
from softsae.activations.synthetic import SyntheticSource
from tests.softsae.test_adaptivek import D, K
from tests.softsae.test_adaptivek import config as model

SOURCE = SyntheticSource(D, 32, 1, 8)


def trainer(out=None, callbacks=(), steps=40, mode="corrected", **options) -> Trainer:
    train = TrainConfig(mode=mode, steps=steps, batch_size=64, lr=2e-3, log_every=5, device="cpu")
    return Trainer(model(joint_from=0.5, **options), train, out=out, callbacks=callbacks, progress=False)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_fits_freezes_and_then_moves_the_probe(tmp_path):
    x, active = SOURCE.sample(4000, seed=3)
    np.save(tmp_path / "s.npy", active.numpy())
    seen = {}

    def watch(run, record):
        if record["step"] in (20, 40):
            seen[record["step"]] = run.sae.selector.w.detach().clone()

    out = tmp_path / "run"
    sae = trainer(out, [watch], scores=str(tmp_path / "s.npy")).fit(x)
    rule = sae.selector
    assert torch.equal(seen[20], rule.fitted_w) and not torch.equal(seen[40], rule.fitted_w)
    records = lines(out)
    assert records[0] == {"event": "prepared", "step": 0, "probe_r2": pytest.approx(rule.r2.item()),
                          "fitted": 3200, "held_out": 800}  # fmt: skip
    assert ["loss_budget" in r for r in records[1:]] == [False] * 4 + [True] * 4
    assert records[1]["k_hat_mean"] == pytest.approx(K, abs=0.7)  # by ranks the midpoint is k
    (tmp_path / "s.npy").unlink()
    loaded = softsae.load(out / "sae")
    assert torch.equal(loaded(x[:9]).x_hat, sae(x[:9]).x_hat) and loaded.selector.r2 == rule.r2


@pytest.mark.parametrize("mode", ["corrected", "published"])
def test_interrupted_in_either_phase_and_resumed_without_scores_is_bit_identical(tmp_path, mode):
    x, active = SOURCE.sample(700, seed=9)
    file = tmp_path / "s.npy"
    np.save(file, active.float().numpy())
    whole = trainer(tmp_path / "whole", mode=mode, scores=str(file)).fit(x)

    def stop(step):
        def callback(run, record):
            if record["step"] == step:
                raise KeyboardInterrupt

        return callback

    for step in (10, 30):
        with pytest.raises(KeyboardInterrupt, match=f"after step {step} of 40"):
            trainer(tmp_path / "parts", [stop(step)], mode=mode, scores=str(file)).fit(x)
        file.unlink(missing_ok=True)
    parts = trainer(tmp_path / "parts", mode=mode, scores=str(file)).fit(x)
    state = parts.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert (whole.selector.w != whole.selector.fitted_w).any()
    assert [r for r in lines(tmp_path / "parts") if "event" in r] == lines(tmp_path / "whole")[:1]


def test_any_source_can_be_prepared_from(tmp_path):
    np.save(tmp_path / "x.npy", SOURCE.sample(500, seed=1)[0].numpy())
    for source in (SOURCE, [SOURCE.sample(300, seed=1)[0]], tmp_path / "x.npy"):
        found = []
        trainer(callbacks=[lambda run, record, found=found: found.append(record)], steps=4).fit(source)
        assert found[0]["fitted"] >= 200 and -1 < found[0]["probe_r2"] < 1
