"""benchmarks/sweep.py: sweeps of some variants each make the result of one sweep of all of them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import sweep
from benchmarks.estimators import rows_of
from softsae.activations.synthetic import SyntheticSource

SMALL = "--device cpu --n 256 --steps 4 --batch_size 32 --lr 1e-3 2e-3".split()


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Calls the script; returns the rows and the other fields of the file that it writes."""
    np.save(tmp_path / "x.npy", SyntheticSource(16, 32, 1, 6).sample(300, seed=9)[0].numpy())

    def call(*arguments):
        out = tmp_path / "results"
        given = ["sweep", "--activations", tmp_path / "x.npy", "--out", out, *SMALL, *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in given])
        sweep.main()
        assert Image.open(out / "sweep-cpu.png").width > 100
        found = json.loads((out / "sweep-cpu.json").read_text())
        return found.pop("rows"), found

    return call


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in rows]


def test_sweeps_of_some_variants_are_together_what_one_of_all_is(script, tmp_path):
    whole, about = script("--variants", "topk", "relu", "matryoshka")
    assert [row["name"] for row in whole][:2] == ["topk-k16-lr0.001", "topk-k16-lr0.002"]
    assert [row["name"] for row in whole][-3:] == ["untrained-k16", "untrained-k32", "untrained-k64"]
    script("--variants", "relu", "--folder", tmp_path / "a")  # without k
    script("--variants", "matryoshka", "topk", "--folder", tmp_path / "b")
    parts, about_parts = script("--run", tmp_path / "a" / "sweep", tmp_path / "b" / "sweep")
    assert timeless(parts) == timeless(whole)
    assert {**about_parts, "environment": about["environment"]} == about


def test_a_sweep_goes_on_in_its_folder(script, tmp_path):
    first, _ = script("--variants", "topk", "--folder", tmp_path / "a")
    again, _ = script("--variants", "msae", "--folder", tmp_path / "a")  # what it was started with counts
    assert again == first


def results(*names: str, **fields) -> dict:
    ce = {"clean": 3.0, "tokens": 90, "untouched": {"zero": 9.0, **dict.fromkeys(names, 4.0)}}
    ce["recovered"] = {"untouched": dict.fromkeys(names, 0.8)}
    rows = [{"name": name, "variant": name.split("-")[0], "k": None, "error": None} for name in names]
    rows += [{"name": "untrained-k16", "variant": "untrained", "k": 16}]
    return {"part": "held-out", "samples": 7, "cross_entropy": ce, "rows": rows} | fields


def test_merged_cross_entropy_has_all_names():
    found = sweep.merged([results("relu-w0.1"), results("topk-k16", "own-k16")])
    names = [row["name"] for row in found["rows"]]
    assert names == ["topk-k16", "relu-w0.1", "own-k16", "untrained-k16"]
    ce = found["cross_entropy"]
    assert ce["untouched"] == {"zero": 9.0, "relu-w0.1": 4.0, "topk-k16": 4.0, "own-k16": 4.0}
    assert set(ce["recovered"]["untouched"]) == {"relu-w0.1", "topk-k16", "own-k16"}
    assert ce["clean"] == 3.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (results("topk-k16"), "topk-k16 is in two"),
        (results("relu-w0.1", samples=8), "are not one sweep"),
        (results("relu-w0.1", cross_entropy=None), "are not one sweep"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(other, message):
    with pytest.raises(ValueError, match=message):
        sweep.merged([results("topk-k16"), other])


def test_rows_of_a_demo():
    names = {"SoftSAE": 0.5, "untrained": 0.25}
    ce = {"untouched": names, "replaced": names, "recovered": {"untouched": names, "replaced": names}}
    found = {"explained_variance": 0.12345, "l0": {"mean": 31.006}, "dead_latents": 3}
    demo = {"estimator": "wide", "cross_entropy": ce, "evaluations": dict.fromkeys(names, found)}
    first, second = rows_of({**demo, "seconds": {"a": 1.25, "b": 2.0}}, seed=4)
    assert first == {
        "estimator": "wide", "seed": 4, "autoencoder": "SoftSAE", "explained_variance": 0.1235,
        "l0_mean": 31.01, "dead_latents": 3, "cross_entropy": 0.5, "recovered": 0.5,
        "cross_entropy_all_replaced": 0.5, "recovered_all_replaced": 0.5, "demo_seconds": 3.2,
    }  # fmt: skip
    assert second["autoencoder"] == "untrained" and second["recovered"] == 0.25
