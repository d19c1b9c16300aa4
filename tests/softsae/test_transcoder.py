"""Transcoders: another target than the input, in memory, on disk, in training and on the command line."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch

import softsae
from softsae import AutoencoderConfig, RunConfig, SparseAutoencoder, TrainConfig, Trainer, checkpoint
from softsae.activations import as_source
from softsae.activations.shards import ShardWriter
from softsae.activations.synthetic import SyntheticSource
from softsae.architectures import ARCHITECTURES
from softsae.autoencoder import FORMAT
from softsae.complexity import check_scores, scored_samples
from softsae.config import resolve
from softsae.sequences import Sequences
from softsae.trainer import FORMAT as CHECKPOINT
from tests.softsae.command import run
from tests.softsae.configs import model

D, D_OUT, N = 16, 7, 48


def mlp(x, seed=0) -> torch.Tensor:
    """A fixed nonlinear function of x (rows, D), far from 0 and of another scale: (rows, D_OUT)."""
    generator = torch.Generator().manual_seed(seed)
    W, V = torch.randn(24, D, generator=generator), torch.randn(D_OUT, 24, generator=generator)
    return 30 * (torch.relu(x @ W.T / D**0.5) @ V.T) + 100


X = SyntheticSource(D, 32, 1, 4).sample(6000, seed=3)[0] * 5 + 2
Y = mlp((X - 2) / 5)
TRAIN, HELD = slice(0, 5000), slice(5000, None)


def recipe(**fields) -> TrainConfig:
    return TrainConfig(
        **{"steps": 60, "batch_size": 64, "lr": 5e-3, "log_every": 10, "device": "cpu", **fields}
    )


def fit(out=None, target=Y[TRAIN], train=None, callbacks=(), **fields) -> Trainer:
    config = model(**{"n": N, "k": 6.0, **fields})
    run = Trainer(config, recipe(**(train or {})), out=out, progress=False, callbacks=callbacks)
    run.fit(X[TRAIN], target=target)
    return run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_learns_a_nonlinear_function_better_than_its_mean(architecture):
    sae = fit(architecture=architecture, train={"steps": 300}).sae
    found = softsae.evaluate(sae, [(X[HELD], Y[HELD])])
    x_hat = sae(X[HELD]).x_hat
    share = 1 - (x_hat - Y[HELD]).pow(2).sum() / (Y[HELD] - Y[HELD].mean(0)).pow(2).sum()
    assert found["explained_variance"] == pytest.approx(share.item(), abs=1e-5)
    assert share > 0.4, share
    assert x_hat.shape == (1000, D_OUT) and sae.W_dec.shape == (N, D_OUT) and sae.b_in.shape == (D,)
    side_by_side = softsae.evaluate(sae, [torch.cat([X[HELD], Y[HELD]], 1)])
    assert side_by_side == found


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if ARCHITECTURES[name][0].top_k])
def test_regularizers_are_of_its_activations_at_the_scale_of_the_target(architecture, tmp_path):
    both = softsae.RegularizerConfig(r1_weight=0.5, r2_weight=0.01)
    train = {"regularizer": both, "steps": 40, "auxk_weight": 0.0, "budget_weight": 0.0}
    run = fit(tmp_path, architecture=architecture, train=train)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    terms = last["loss_reconstruction"] + 0.5 * D_OUT**0.5 * last["loss_r1"] + 0.01 * D_OUT * last["loss_r2"]
    assert last["loss"] == pytest.approx(terms, rel=1e-5)
    assert last["loss_r1"] > 0 and run.sae(X[HELD]).x_hat.shape == (1000, D_OUT)


@pytest.mark.parametrize("weighting", ["uniform", "reverse"])
def test_every_k_of_msae_reconstructs_the_target(weighting):
    options = softsae.MSAEConfig(ks=[2, 5, N], weighting=weighting)
    config = AutoencoderConfig(d=D, d_out=D_OUT, n=N, k=5.0, architecture="msae", msae=options)
    sae = SparseAutoencoder(config, seed=1)
    sae.initialize(X, Y)
    x, y = X[:30], Y[:30]
    out = sae(x, sae.inference_phase(hard=True)._replace(step=0), y)
    errors = [sae(x, target=y, k=k).losses["reconstruction"] for k in options.ks]
    weights = [3, 2, 1] if weighting == "reverse" else [1, 1, 1]
    expected = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
    torch.testing.assert_close(out.losses["reconstruction"], expected)


def test_the_probe_of_adaptivek_sees_the_input_alone(tmp_path):
    """Its samples, their scores and what it has learned are those of the autoencoder on the same input."""
    np.save(tmp_path / "scores.npy", np.linspace(0, 1, 5000))
    probes = []
    for target in (None, Y[TRAIN]):
        options = softsae.AdaptiveKConfig(scores=str(tmp_path / "scores.npy"), joint_from=1.0)
        run = fit(target=target, architecture="adaptivek", adaptivek=options, train={"steps": 5})
        probes.append((run.sae.selector.w / run.sae.scale, run.sae.selector.b))
    torch.testing.assert_close(probes[0], probes[1])
    run = fit(architecture="adaptivek", train={"steps": 20, "mode": "published"})
    assert run.sae(X[HELD]).k_hat.std() > 0


def test_the_probe_takes_what_the_language_model_lost_beside_the_input(tmp_path):
    folder = write_shards(tmp_path / "x", X[:300])
    np.save(folder / "scores.npy", np.arange(300.0))
    source = as_source(folder, write_shards(tmp_path / "y", Y[:300]))
    options = softsae.AdaptiveKConfig(scores="token_loss", samples=50)
    check_scores(options, source)
    x, scores = scored_samples(options, X[:1], source, seed=0)
    assert x.shape == (50, D) and scores.diff().min() > 0
    (folder / "scores.npy").unlink()
    with pytest.raises(FileNotFoundError, match="collect with --collect.scores true"):
        check_scores(options, source)


def test_the_start_is_a_regression():
    """Rows of W_dec along the covariance with the target; W_enc at the scale with the least error."""
    sae = SparseAutoencoder(AutoencoderConfig(d=D, d_out=D_OUT, n=N, k=5.0, architecture="topk"), seed=1)
    direction, silent = sae.W_enc.detach().clone(), sae.W_dec[3].detach().clone()
    with torch.no_grad():
        sae.b_enc[3] = -1e3  # never active
    sae.initialize(X, Y)
    with torch.no_grad():
        x, y = sae.normalize(X), sae.normalize_target(Y)
        a = torch.relu((x - sae.b_in) @ direction.T + sae.b_enc)
        covariance = torch.nn.functional.normalize((a - a.mean(0)).T @ (y - y.mean(0)), dim=1)
    alive = torch.arange(N) != 3
    torch.testing.assert_close(sae.W_dec.detach()[alive], covariance[alive], rtol=1e-3, atol=1e-4)
    assert torch.equal(sae.W_dec[3], silent)
    scale = (sae.W_enc / direction).mean().item()
    torch.testing.assert_close(sae.W_enc.detach(), scale * direction)

    def error(share):
        f = torch.zeros_like(a).scatter(1, a.topk(5).indices, a.topk(5).values) * share
        return (f @ sae.W_dec + sae.b_dec - y).pow(2).sum().item()

    assert error(scale) < min(error(scale * 0.98), error(scale * 1.02), error(0))


def test_a_learned_budget_does_not_collapse():
    """With random decoder rows k_hat falls to 1 here, and three quarters of the latents die."""
    source = SyntheticSource(64, 256, 2, 30)
    generator = torch.Generator().manual_seed(0)
    W, V = torch.randn(256, 64, generator=generator), torch.randn(48, 256, generator=generator)
    x = source.sample(9000, seed=0)[0]
    y = torch.nn.functional.gelu(x @ W.T / 4) @ V.T / 16
    train = TrainConfig(steps=300, batch_size=128, lr=2e-3, device="cpu")
    sae = Trainer(AutoencoderConfig(n=512, k=16.0), train, progress=False).fit(x[:8000], target=y[:8000])
    found = softsae.evaluate(sae, [(x[8000:], y[8000:])])
    assert abs(found["l0"]["mean"] - 16) < 3 and found["explained_variance"] > 0.6


def test_formula_in_the_units_of_both():
    sae = SparseAutoencoder(AutoencoderConfig(d=D, d_out=D_OUT, n=N, k=5.0, architecture="topk"), seed=1)
    sae.initialize(X, Y)
    assert sae.normalize(X).pow(2).mean().item() == pytest.approx(1, rel=1e-5)
    assert sae.normalize_target(Y).pow(2).mean().item() == pytest.approx(1, rel=1e-5)
    x, y = X[:20].double(), Y[:20].double()
    rms = [v.double().pow(2).mean().sqrt() for v in (X, Y)]
    W_enc, W_dec, b_in, b_dec = (p.detach().double() for p in (sae.W_enc, sae.W_dec, sae.b_in, sae.b_dec))
    a = torch.relu((x / rms[0] - b_in) @ W_enc.T)
    f = torch.zeros_like(a).scatter(1, a.topk(5).indices, a.topk(5).values)
    y_hat = (f @ W_dec + b_dec) * rms[1]
    out = sae(X[:20], target=Y[:20])
    torch.testing.assert_close(out.x_hat.double(), y_hat, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sae.decode(sae.encode(X[:20])), out.x_hat)
    loss = ((y_hat - y) / rms[1]).pow(2).sum(1).mean()
    assert out.losses["reconstruction"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert sae(X[:20]).losses == {}


def test_the_target_x_is_the_autoencoder_with_its_bias_in_two():
    """With one set of weights everything is equal, and b_dec's gradient is the sum of the two parts'."""
    one = SparseAutoencoder(AutoencoderConfig(d=D, n=N, k=6.0), seed=1)
    one.initialize(X)
    two = SparseAutoencoder(AutoencoderConfig(d=D, d_out=D, n=N, k=6.0), seed=2)
    two.initialize(X, X)
    torch.testing.assert_close(two.b_in, one.b_dec)
    torch.testing.assert_close(two.b_dec, one.b_dec)
    torch.testing.assert_close(two.target_scale, one.scale)
    state = dict(one.state_dict())
    two.load_state_dict({**two.state_dict(), **state})
    phase = one.inference_phase(hard=False)
    dead = torch.arange(0, N, 3)
    for sae, target in ((one, None), (two, X[:50])):
        out = sae(X[:50], phase, target)
        terms = {**out.losses, "auxk": sae.auxk_loss(X[:50], out.x_hat, dead, target)}
        sum(terms.values()).backward()
        if sae is one:
            first, first_terms = out, terms
    torch.testing.assert_close(out.x_hat, first.x_hat)
    assert terms.keys() == first_terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, first_terms[name])
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(getattr(two, name).grad, getattr(one, name).grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.b_in.grad + two.b_dec.grad, one.b_dec.grad, rtol=1e-4, atol=1e-4)


def test_auxk_is_of_the_error_on_the_target():
    sae = SparseAutoencoder(AutoencoderConfig(d=D, d_out=D_OUT, n=N, k=5.0, architecture="topk"), seed=1)
    sae.initialize(X, Y)
    x, y, dead = X[:40], Y[:40], torch.tensor([2, 9])
    with torch.no_grad():
        x_hat = sae(x).x_hat
        rms = Y.pow(2).mean().sqrt()
        e = (y - x_hat) / rms
        z = torch.relu((x / X.pow(2).mean().sqrt() - sae.b_in) @ sae.W_enc[dead].T)
        expected = (e - z @ sae.W_dec[dead]).pow(2).sum() / (e - e.mean(0)).pow(2).sum()
    found = sae.auxk_loss(x, x_hat, dead, y)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    found.backward()
    assert sae.W_enc.grad[dead].abs().sum() > 0


def test_matryoshka_and_metrics_are_of_the_target(tmp_path):
    run = fit(tmp_path, architecture="topk", matryoshka=[0.5, 0.5])
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["explained_variance"] < 1
    assert run.config.autoencoder.d_out == D_OUT


def test_saved_loaded_and_resumed(tmp_path):
    whole = fit(tmp_path / "whole")
    again = softsae.load(tmp_path / "whole" / "sae")
    assert again.config == whole.sae.config and again.config.d_out == D_OUT
    assert torch.equal(again(X[HELD]).x_hat, whole.sae(X[HELD]).x_hat)

    def stop(run, record):
        if record["step"] == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", callbacks=[stop])
    cut = fit(tmp_path / "cut")
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, cut.sae.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"they differ in autoencoder.d_out: 7 and None"):
        fit(tmp_path / "whole", target=None)


def test_fields_that_a_file_lacks_have_their_defaults(tmp_path):
    """As in files from before there were transcoders and regularizers."""
    sae = SparseAutoencoder(model(d=4, n=8, k=2.0), seed=1)
    file = sae.save(tmp_path / "sae")
    tensors, header = checkpoint.read(file, FORMAT)
    del header["config"]["d_out"]
    for name in ("options", "msae", "adaptivek"):
        del header["config"][name]
    header["config"]["jumprelu"]["bandwidth"] = 0.123  # of an architecture that it is not, another default
    for name in ("input", "moves_encoder"):
        del header["config"]["softsae"]["estimator"][name]
    checkpoint.write(file, tensors, header)
    assert softsae.load(file).config == sae.config
    run = Trainer(model(n=N, k=6.0), recipe(), out=tmp_path / "run", progress=False)
    run.fit(X[TRAIN])
    tensors, header = checkpoint.read(run.checkpoint_file, CHECKPOINT)
    del header["config"]["autoencoder"]["d_out"], header["config"]["train"]["regularizer"]
    checkpoint.write(run.checkpoint_file, tensors, header)
    steps = []
    again = Trainer(model(n=N, k=6.0), recipe(), out=tmp_path / "run", progress=False,
                    callbacks=[lambda run, record: steps.append(record)])  # fmt: skip
    again.fit(X[TRAIN])
    assert steps == [] and torch.equal(again.sae.W_enc, run.sae.W_enc)


def write_shards(out, x, first=0):
    """A folder of shards with one sequence of len(x) + first tokens, the first ones excluded."""
    sequences = Sequences(
        token_ids=np.zeros(len(x) + first, np.int32),
        offsets=np.array([0, len(x) + first]),
        document=np.zeros(1, np.int32),
        names=["text"],
    )
    with ShardWriter(out, x.shape[1], shard_rows=400) as writer:
        writer.add(x, torch.zeros(len(x), dtype=torch.int32), torch.arange(len(x)) + first)
        writer.finish(sequences, model="none", gguf_file=None, revision=None, layer=0, hook_point="x",
                      context=8, excluded={"positions": 0, "nonfinite": 0})  # fmt: skip
    return out


def stored(tmp_path, kind, x, name):
    if kind == "tensor":
        return x
    if kind == "shards":
        return write_shards(tmp_path / name, x)
    np.save(tmp_path / f"{name}.npy", x.numpy())
    return tmp_path / f"{name}.npy"


@pytest.mark.parametrize(
    "kinds", ["tensor tensor", "npy npy", "shards shards", "tensor shards", "npy tensor"]
)
def test_rows_and_targets_are_shuffled_together(kinds, tmp_path):
    x = torch.arange(1000.0).unsqueeze(1).expand(-1, 3).contiguous()
    y = -torch.arange(1000.0).unsqueeze(1).expand(-1, 2).contiguous()
    left, right = kinds.split()
    source = as_source(stored(tmp_path, left, x, "x"), stored(tmp_path, right, y, "y"))
    assert (source.d, source.d_out, len(source)) == (3, 2, 1000)
    batches = list(islice(source.batches(64, seed=1), 20))
    rows = torch.cat(batches)
    assert rows.shape == (1280, 5) and torch.equal(rows[:, 0], -rows[:, 4])
    epoch = rows[:1000, 0]
    assert torch.equal(epoch.sort().values, x[:, 0]) and not torch.equal(epoch, x[:, 0])
    for ours, theirs in zip(batches[7:], source.batches(64, 1, start=7), strict=False):
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.cat(list(source.in_order(300))), torch.cat([x, y], 1))


def test_an_iterable_of_pairs():
    pairs = [(X[i : i + 100], Y[i : i + 100]) for i in range(0, 5000, 100)]
    run = Trainer(model(n=N, k=6.0), recipe(), progress=False)
    sae = run.fit(pairs, held_out=[(X[HELD], Y[HELD])])
    assert sae.config.d_out == D_OUT
    with pytest.raises(ValueError, match="a pair of the iterator has 100 rows and 99 targets"):
        Trainer(model(n=N, k=6.0), recipe(), progress=False).fit([(X[:100], Y[:99])])
    with pytest.raises(TypeError, match="both tensors and pairs"):
        Trainer(model(n=N, k=6.0), recipe(), progress=False).fit([(X[:100], Y[:100]), X[:100]])


def test_targets_that_do_not_belong_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the activations has 5000 rows, its target the target 4999"):
        fit(target=Y[:4999])
    with pytest.raises(TypeError, match=r"the activations \(SyntheticSource\) cannot be paired by row"):
        Trainer(model(n=N), recipe()).fit(SyntheticSource(D, 32, 1, 4), target=Y)
    a, b = write_shards(tmp_path / "a", X[:500]), write_shards(tmp_path / "b", Y[:500], first=2)
    with pytest.raises(ValueError, match="row 0 of .*a is position 0 of sequence 0, that of .*b position 2"):
        as_source(a, b)
    sae = SparseAutoencoder(AutoencoderConfig(d=D, d_out=D_OUT, n=N, k=5.0))
    with pytest.raises(ValueError, match=r"x has shape \(4, 16\), its target \(3, 7\)"):
        sae(X[:4], target=Y[:3])
    with pytest.raises(ValueError, match=r"target of shape \(4, 16\) must end in d_out=7"):
        sae(X[:4], target=X[:4])
    with pytest.raises(ValueError, match=r"must end in d \+ d_out = 16 \+ 7"):
        softsae.evaluate(sae, [X[:4]])
    with pytest.raises(ValueError, match="a target is given, but this is an autoencoder"):
        SparseAutoencoder(AutoencoderConfig(d=D, n=N, k=5.0))(X[:4], target=X[:4])
    with pytest.raises(ValueError, match="d_out=7 in the configuration, but there is no target"):
        resolve(RunConfig(AutoencoderConfig(d_out=7)), 16)
    with pytest.raises(ValueError, match="d_out=7 in the configuration, but the target has d=8"):
        resolve(RunConfig(AutoencoderConfig(d_out=7)), 16, 8)


def test_nonfinite_targets_are_found(tmp_path):
    bad = Y[TRAIN].clone()
    bad[4321, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in batch .*row 4321 of the target"):
        fit(target=bad)


def test_on_the_command_line(tmp_path):
    for name, part, rows in (("acts", "train", TRAIN), ("acts", "heldout", HELD)):
        write_shards(tmp_path / name / part, X[rows])
        write_shards(tmp_path / "mlp" / part, Y[rows])
    small = ["--autoencoder.n=48", "--autoencoder.k=6", "--train.steps=60", "--train.batch_size=64"]
    paths = ["--activations", tmp_path / "acts", "--target", tmp_path / "mlp"]
    run("train", *paths, "--out", tmp_path / "run", *small)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["part"] == "held-out" and found["metrics"]["samples"] == 1000
    assert found["target"] == str(tmp_path / "mlp" / "heldout")
    assert "d = 16 to d_out = 7 (a transcoder)" in (tmp_path / "run" / "summary.md").read_text()
    assert "d=16 to d_out=7" in run("info", tmp_path / "run")[0]
    assert "it is a transcoder" in run("eval", tmp_path / "run")[0]
    again = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert again["metrics"] == found["metrics"]
    np.save(tmp_path / "short.npy", Y[:4000].numpy())
    for arguments, message in (
        (["--target", tmp_path / "short.npy"], f"train has 5000 rows, its target {tmp_path}/short.npy 4000"),
        (["--heldout_target", tmp_path / "mlp"], "--heldout_target is given, but no --target"),
        (["--target", tmp_path / "mlp", "--heldout", tmp_path / "acts" / "heldout",
          "--heldout_target", tmp_path / "short.npy"], "has 1000 rows, its target"),
    ):  # fmt: skip
        said = run(
            "train", "--activations", tmp_path / "acts", "--out", tmp_path / "no", *arguments, status=2
        )
        assert message in said[1] and said[1].count("\n") == 1
        assert not (tmp_path / "no").exists()
    said = run("eval", tmp_path / "run", "--activations", tmp_path / "acts", status=2)[1]
    assert "d_out=None, the autoencoder d_out=7" in said


def test_a_transcoder_does_not_stand_in_for_the_residual_stream():
    sae = SparseAutoencoder(AutoencoderConfig(d=4, d_out=4, n=8, k=2.0))
    with pytest.raises(ValueError, match="a transcoder does not reconstruct the residual stream"):
        with softsae.attach(torch.nn.Module(), 0, sae):
            pass
