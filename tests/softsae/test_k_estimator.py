"""The k estimators against their formulas, their start, their clamp, their gradients and their precision."""

from __future__ import annotations

import math

import pytest
import torch

import softsae
from softsae import EstimatorConfig, RunConfig, SparseAutoencoder, TrainConfig, Trainer
from softsae.activations.synthetic import SyntheticSource
from softsae.config import resolve, resolve_autoencoder
from tests.softsae.configs import model

KINDS = ("wide", "bottleneck", "shared", "linear")
HIDDEN = {"wide": 30, "bottleneck": 5, "shared": 30, "linear": 6}


def autoencoder(mode="corrected", kind="wide", options=None, **fields) -> SparseAutoencoder:
    """One whose parameters are all random, the estimator's included."""
    config = model(
        **{"d": 6, "n": 30, "k": 4.0, **fields}, estimator=EstimatorConfig(kind, 5, **options or {})
    )
    sae = SparseAutoencoder(resolve_autoencoder(config, mode))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (sae.b_dec, sae.b_enc, *sae.selector.estimator.parameters()):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 - 1)
    return sae


def activations(sae, x) -> torch.Tensor:
    """relu(W_enc (x - b_dec) + b_enc), as the encoder gives them, with its gradient."""
    return torch.relu(sae.encoder(x))


def k_hat(sae, x) -> torch.Tensor:
    return sae.selector.estimator(sae, x, activations(sae, x))


def by_hand(sae, row) -> float:
    """k_hat of one row in double precision, written out."""
    e = sae.selector.estimator
    kind = e.options.estimator.kind
    centred = [v - b for v, b in zip(row.tolist(), sae.b_dec.tolist(), strict=True)]

    def layer(weights, biases):
        for w, b in zip(weights.tolist(), biases.tolist(), strict=True):
            yield max(0.0, math.fsum(p * q for p, q in zip(w, centred, strict=True)) + b)

    if kind == "linear":
        h = centred
    else:
        h = list(layer(sae.W_enc, sae.b_enc) if kind == "shared" else layer(e.W, e.c))
    assert len(h) == HIDDEN[kind] == len(e.w2)
    score = math.fsum(p * q for p, q in zip(h, e.w2.tolist(), strict=True)) + e.c2.item()
    return min(30.0, max(e.options.k_min, e.options.k_max / (1 + math.exp(-score))))


@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind):
    sae, x = autoencoder(kind=kind, k_max=11.0), torch.randn(7, 6)
    torch.testing.assert_close(k_hat(sae, x), torch.tensor([by_hand(sae, row) for row in x]))


@pytest.mark.parametrize("kind", KINDS)
def test_constant_input_has_as_many_parameters_and_one_value(kind):
    sae = autoencoder(kind=kind, k_min=0.0, k_max=11.0, options={"input": "constant"})
    seeing = autoencoder(kind=kind, k_max=11.0)
    assert {n: p.shape for n, p in sae.named_parameters()} == {
        n: p.shape for n, p in seeing.named_parameters()
    }
    constant = sae.selector.estimator.constant
    assert constant.norm().item() == pytest.approx(math.sqrt(6))  # unit mean square
    found = k_hat(sae, torch.randn(7, 6))
    torch.testing.assert_close(found, torch.full((7,), by_hand(sae, constant)))
    gradients = torch.autograd.grad(found.sum(), list(sae.selector.estimator.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["x", "constant"])
def test_training_starts_at_the_target(kind, source):
    options = EstimatorConfig(kind, 5, input=source)
    sae = SparseAutoencoder(model(d=6, n=30, k=4.0, k_max=16.0, estimator=options))
    torch.testing.assert_close(k_hat(sae, torch.randn(3, 6)), torch.full((3,), 4.0))


def test_a_wide_estimator_starts_from_the_encoder():
    sae = SparseAutoencoder(model(d=6, n=30, k=4.0))
    assert torch.equal(sae.selector.estimator.W, sae.W_enc)


def test_clamped_to_k_min_and_default_k_max_is_twice_k():
    sae = autoencoder(k_min=3.0)
    estimator = sae.selector.estimator
    with torch.no_grad():
        estimator.w2.zero_()
        for bias, k in ((-20.0, 3.0), (20.0, 8.0)):
            estimator.c2.fill_(bias)
            assert k_hat(sae, torch.randn(1, 6)).item() == pytest.approx(k)


@pytest.mark.parametrize("kind", ["wide", "bottleneck", "linear"])
def test_gradient_to_b_dec_as_configured(kind):
    for moves in (False, True):
        sae = autoencoder(kind=kind, options={"moves_b_dec": moves})
        x = torch.randn(7, 6, requires_grad=True)
        found = k_hat(sae, x).sum()
        to_b_dec, to_x = torch.autograd.grad(found, (sae.b_dec, x), allow_unused=True)
        assert (to_b_dec is not None) == moves
        if moves:
            torch.testing.assert_close(to_b_dec, -to_x.sum(0))


def test_shared_activations_move_the_encoder_only_where_asked():
    for moves in (False, True):
        sae = autoencoder(kind="shared", k_max=11.0, options={"moves_encoder": moves})
        x = torch.randn(7, 6)
        sae.zero_grad()
        k_hat(sae, x).sum().backward()
        reached = [p.grad is not None for p in (sae.W_enc, sae.b_enc, sae.b_dec)]
        assert reached == [moves] * 3
    W, b, b_dec = (p.detach().double().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.b_dec))
    e = sae.selector.estimator
    score = torch.relu((x.double() - b_dec) @ W.T + b) @ e.w2.detach().double() + e.c2.item()
    (11 * torch.sigmoid(score)).clamp(1, 30).sum().backward()
    for ours, theirs in ((sae.W_enc, W), (sae.b_enc, b), (sae.b_dec, b_dec)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_float32_under_autocast_and_bfloat16_as_published():
    x = torch.randn(200, 6)
    for mode, quantised in (("corrected", False), ("published", True)):
        for kind in KINDS:
            sae = autoencoder(mode, kind)
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                found = k_hat(sae, x)
            assert found.dtype == torch.float32
            assert torch.equal(found, found.bfloat16().float()) == quantised


@pytest.mark.parametrize("options", [{"kind": "shared", "input": "constant"}, {"kind": "linear"}])
def test_saved_and_loaded(options, tmp_path):
    config = model(d=6, n=30, k=4.0, estimator=EstimatorConfig(**options, init="random"))
    sae = SparseAutoencoder(config, seed=3)
    x = torch.randn(5, 6)
    sae.save(tmp_path / "sae")
    again = softsae.load(tmp_path / "sae")
    assert again.config == sae.config
    assert torch.equal(again(x).k_hat, sae(x).k_hat)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_section_saved_before_there_were_these_options_loads():
    values = {"kind": "bottleneck", "width": 5, "init": "target", "moves_b_dec": False, "dtype": "float32"}
    assert EstimatorConfig(**values) == EstimatorConfig("bottleneck", 5, "target", False, "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_budgets_follow_what_is_seen(kind):
    """On data of 1 to 6 features k_hat spreads; from a constant it cannot, and may stay below its target."""
    source = SyntheticSource(16, 32, 1, 6)
    train = TrainConfig(steps=300, batch_size=64, lr=5e-3, device="cpu")
    held = [source.sample(1000, seed=5)[0]]
    spread = {}
    for seen in ("x", "constant"):
        config = model(n=48, k=3.5, estimator=EstimatorConfig(kind, 16, input=seen))
        sae = Trainer(config, train, progress=False).fit(source)
        spread[seen] = softsae.evaluate(sae, held)["k_hat"]
    assert abs(spread["x"]["mean"] - 3.5) < 0.6 and 2 < spread["constant"]["mean"] < 4
    assert spread["x"]["sd"] > 0.5 and spread["constant"]["sd"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind, multiplier", [("wide", 5), ("bottleneck", 1), ("shared", 5), ("linear", 1)])
def test_learning_rate_by_kind(kind, multiplier):
    for mode, expected in (("corrected", multiplier), ("published", 1)):
        run = RunConfig(model(estimator=EstimatorConfig(kind)), TrainConfig(mode=mode))
        assert resolve(run, 8).train.estimator_lr_multiplier == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "deep"}, "estimator.kind='deep'"),
        ({"width": 0}, "estimator.width=0"),
        ({"input": "y"}, "estimator.input='y'"),
        ({"moves_encoder": True}, "estimator.moves_encoder is for kind 'shared', not 'wide'"),
    ],
)
def test_fields(options, message):
    with pytest.raises(ValueError, match=message):
        EstimatorConfig(**options)
