"""Complexity scores: their sources, scale and errors; local dimension on manifolds of known dimension."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from softsae import AdaptiveKConfig
from softsae.activations.synthetic import SyntheticSource
from softsae.activations.tensors import IteratorSource, TensorSource
from softsae.complexity import check_scores, scored_samples, to_scale
from softsae.local_dimension import intrinsic_dimension, local_dimension

D = 12
SOURCE = SyntheticSource(D, 32, 1, 8)


def samples(count: int) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(0))


def test_scores_are_mapped_to_0_to_10():
    scores = torch.tensor([3.0, -1.0, 1e6, 3.0])
    assert to_scale(scores, "ranks").tolist() == pytest.approx([5, 0, 10, 5])
    assert to_scale(scores[:2], "min_max").tolist() == [10, 0]
    assert to_scale(torch.tensor([0.5, 10.0]), "none").tolist() == [0.5, 10]
    with pytest.raises(ValueError, match=r"scores lie in 3 ... 1e\+06, not in 0 ... 10"):
        to_scale(scores[2:], "none")


def test_samples_are_drawn_by_the_seed_and_without_broken_rows(tmp_path):
    x = samples(1000)
    x[7] = torch.nan
    np.save(tmp_path / "s.npy", np.arange(1000) / 100)
    options = AdaptiveKConfig(scores=str(tmp_path / "s.npy"), samples=600, mapping="none")
    found, scores = scored_samples(options, x[:8], TensorSource(x), seed=0)
    assert torch.equal(found, x[(scores * 100).round().long()])  # every score has its own row
    assert len(found) in (599, 600) and len(scores.unique()) == len(scores)
    again, other = (scored_samples(options, x, TensorSource(x), seed)[1] for seed in (0, 1))
    assert torch.equal(again, scores) and not torch.equal(other[:50], scores[:50])
    everything = scored_samples(AdaptiveKConfig(scores=str(tmp_path / "s.npy")), x, TensorSource(x), 0)[0]
    assert len(everything) == 999


def test_wrong_scores_are_named(tmp_path):
    x = TensorSource(samples(50))
    file = tmp_path / "s.npy"

    def refused(message, content=None, source=x, error=ValueError, scores=str(file)):
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            np.save(file, content)
        with pytest.raises(error, match=message):
            check_scores(AdaptiveKConfig(scores=scores), source)

    refused(r"scores .*s.npy' do not exist", error=FileNotFoundError)
    refused(r"shape \(49,\), the activations are 50 rows", np.zeros(49))
    refused(r"shape \(50, 1\), the activations are 50 rows", np.zeros((50, 1)))
    refused("hold nan in row 3", np.where(np.arange(50) == 3, np.nan, 1.0))
    refused("hold inf in row 0", np.where(np.arange(50) == 0, np.inf, 1.0))
    refused("have dtype <U1; numbers", np.full(50, "a"))
    refused("have dtype bool", np.zeros(50, bool))
    refused("cannot be read", b"not numpy at all")
    np.save(file, np.zeros(50))
    refused("cannot be read", file.read_bytes()[:300])
    refused("cannot be read", np.full(50, None))
    refused("activations of a SyntheticSource have no numbers", source=SOURCE)
    refused("activations of a IteratorSource", source=IteratorSource([samples(9)]))
    refused("measured by softsae collect", scores="token_loss")
    with pytest.raises(ValueError, match="cannot be fitted to 1 samples"):
        scored_samples(AdaptiveKConfig(), samples(1), SOURCE, 0)
    with pytest.raises(ValueError, match="20 distinct samples are too few for neighbours=20"):
        scored_samples(AdaptiveKConfig(), samples(20), SOURCE, 0)


def manifold(m: int, count: int, seed: int = 0, d: int = 20) -> torch.Tensor:
    """A curved m-dimensional surface in d dimensions."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.rand(count, m, generator=draw)
    frame = torch.linalg.qr(torch.randn(d, d, generator=draw)).Q
    return torch.cat([u, 0.2 * torch.sin(3 * u)], dim=1) @ frame[: 2 * m] + 5


@pytest.mark.parametrize("m, tolerance", [(1, 0.05), (2, 0.1), (5, 0.5)])
def test_dimension_of_known_manifolds(m, tolerance):
    x = manifold(m, 3000)
    assert intrinsic_dimension(x) == pytest.approx(m, abs=tolerance)
    # Few neighbours would bias the mean of the local estimates themselves (MacKay & Ghahramani).
    assert intrinsic_dimension(x, neighbours=3) == pytest.approx(m, abs=2 * tolerance)
    local = local_dimension(x)
    assert local.shape == (3000,) and local.dtype == torch.float64
    assert local.median().item() == pytest.approx(m, rel=0.15)


def test_the_estimate_is_the_formula(monkeypatch):
    x = manifold(3, 60)
    monkeypatch.setattr("softsae.local_dimension.CHUNK_BYTES", 7 * 6 * 20 * 4)  # seven rows at once
    distance = np.linalg.norm(x.double().numpy()[:, None] - x.double().numpy()[None], axis=2)
    inverse, around = np.zeros(60), []
    for i in range(60):
        order = sorted((t, j) for j, t in enumerate(distance[i]) if j != i)[:6]
        around.append([i] + [j for _, j in order])
        inverse[i] = np.mean([math.log(order[-1][0] / t) for t, _ in order[:-1]])
    expected = [1 / inverse[ids].mean() for ids in around]
    np.testing.assert_allclose(local_dimension(x, 6).numpy(), expected, rtol=1e-3)
    assert intrinsic_dimension(x, 6) == pytest.approx(1 / inverse.mean(), rel=1e-3)


def test_local_dimension_tells_the_parts_apart_and_copies_count_once():
    line, volume = manifold(1, 1000), manifold(6, 1000, seed=1) + 30
    both = torch.cat([line, volume])
    local = local_dimension(both)
    assert local[:1000].max() < 2 and local[1000:].min() > 3
    doubled = local_dimension(torch.cat([both, both[:500]]))
    torch.testing.assert_close(doubled[:2000], local)
    assert torch.equal(doubled[2000:], doubled[:500])


def test_collect_stores_the_loss_of_every_row(tiny_model, prose, tmp_path):
    from softsae.activations.collect import Exclusion, collect
    from softsae.activations.shards import ShardSource
    from softsae.language_model import load_language_model, residual_stream
    from softsae.options import CollectConfig
    from softsae.sequences import tokenize
    from softsae.text import corpus

    lm = load_language_model(str(tiny_model))
    sequences = tokenize(lm.tokenizer, corpus([prose])[0], 40, 1500, seed=1)
    x = residual_stream(lm, next(sequences.batches(8))[0], 1)
    rule = Exclusion(float(x.norm(dim=-1).quantile(0.9)), None)
    settings = CollectConfig(layer=1, context=40, batch_size=7, shard_rows=300, scores=True)
    source = collect(lm, sequences, tmp_path / "acts", settings, rule)
    scores = np.load(tmp_path / "acts" / "scores.npy")
    assert source.manifest["excluded"]["positions"] > 20 and scores.shape == (len(source),)
    expected, last = [], 0
    for number in range(len(sequences)):
        ids = torch.from_numpy(sequences[number].astype(np.int64))
        with torch.no_grad():
            p = lm.model(ids[None]).logits[0].double().softmax(-1)
        for place in source.position[source.sequence == number]:
            ends = place + 1 == len(ids)
            last += ends
            expected.append(-(p[place] * p[place].log()).sum() if ends else -p[place, ids[place + 1]].log())
    assert last > 10  # what is expected there is the entropy
    np.testing.assert_allclose(scores, np.asarray(expected), rtol=1e-4)
    check_scores(AdaptiveKConfig(scores="token_loss"), source)
    ShardSource(tmp_path / "acts", verify=True)
    plain = collect(lm, sequences, tmp_path / "plain", CollectConfig(layer=1, context=40), rule)
    with pytest.raises(FileNotFoundError, match="collect with --collect.scores true"):
        check_scores(AdaptiveKConfig(scores="token_loss"), plain)
    (tmp_path / "acts" / "scores.npy").unlink()
    with pytest.raises(FileNotFoundError, match="scores.npy' is missing"):
        ShardSource(tmp_path / "acts")


def test_the_command_line_takes_scores(tiny_model, prose, tmp_path, capsys):
    from softsae.cli import main

    acts, run = tmp_path / "acts", tmp_path / "run"
    assert main(["collect", "--model", str(tiny_model), "--text", str(prose), "--out", str(acts), "--tokens",
                 "800", "--collect.layer", "1", "--collect.scores", "true"]) == 0  # fmt: skip
    train = ["train", "--activations", str(acts), "--train.steps", "6", "--train.batch_size", "64",
             "--autoencoder.n", "48", "--autoencoder.k", "4", "--autoencoder.architecture", "adaptivek",
             "--autoencoder.adaptivek.scores"]  # fmt: skip
    assert main([*train, "token_loss", "--out", str(run)]) == 0
    assert "probe_r2" in json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    np.save(tmp_path / "s.npy", np.zeros(3))
    capsys.readouterr()
    assert main([*train, str(tmp_path / "s.npy"), "--out", str(tmp_path / "no")]) == 2
    assert "have shape (3,)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
