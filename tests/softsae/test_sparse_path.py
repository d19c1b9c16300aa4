"""The sparse path against the dense one: passes, whole trainings, what they leave in memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softsae import AutoencoderConfig, EstimatorConfig, SoftSAEConfig, SparseAutoencoder, TrainConfig
from softsae import config as configuration
from softsae.losses import RegularizerConfig
from softsae.schedules import Phase
from softsae.sparse import Sparse
from tests.softsae.sparse_cases import ALPHA, CASES, SOURCE, D, Exactly, midway, records

PHASES = {
    "soft": {"hard": False},
    "hard": {"hard": True},
    "frozen": {"hard": True, "learns": "frozen_estimator"},
    "decoder": {"hard": True, "learns": "decoder"},
    "inference": {"hard": True, "step": None},
}


def autoencoder(name: str) -> SparseAutoencoder:
    """Thresholds as well are as in the middle of a training."""
    model, train = CASES[name]
    run = configuration.RunConfig(model, TrainConfig(**train))
    sae = midway(SparseAutoencoder(configuration.resolve(run, D).autoencoder, seed=3))
    if hasattr(sae.selector, "threshold"):
        sae.selector.threshold.data.fill_(0.7)
    return sae


def passed(sae: SparseAutoencoder, x, phase: Phase, how: Sparse | None):
    """The output, and by name what a weighted sum of its losses gives every parameter."""
    sae.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(phase.step is not None):
        out = sae(x, phase, how=how)
    loss = sum((1 + i) * term for i, (_, term) in enumerate(sorted(out.losses.items())))
    if loss.requires_grad:
        loss.backward()
    return out, {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_a_pass_is_the_dense_one(name, phase):
    sae = autoencoder(name)
    moment = Phase(ALPHA, 8.0, **{"step": 40, **PHASES[phase]})
    x = SOURCE.sample(48, seed=2)[0].double()
    if reason := sae.selector.dense_only(moment):
        with pytest.raises(ValueError, match="sparse: "):
            sae(x, moment, how=Sparse())
        assert name == "softsae-published" and phase == "hard" and "floor" in reason
        return
    buffers = {name: value.clone() for name, value in sae.named_buffers()}
    dense, gradients = passed(sae, x, moment, None)
    after = {name: value.clone() for name, value in sae.named_buffers()}
    for name_, value in sae.named_buffers():
        value.copy_(buffers[name_])
    sparse, found = passed(sae, x, moment, Sparse())
    assert not sparse.overflow and sparse.code is not None and dense.code is None
    # A gate below 2^-24 is 0 in the dense path.
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(sparse.latents, dense.latents, **tolerance)
    torch.testing.assert_close(sparse.x_hat, dense.x_hat, **tolerance)
    torch.testing.assert_close(sparse.k_hat, dense.k_hat)
    assert sparse.losses.keys() == dense.losses.keys()
    for term in dense.losses:
        torch.testing.assert_close(sparse.losses[term], dense.losses[term], **tolerance)
    assert found.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=float(1e-6 * scale + 1e-12))
    for buffer, value in sae.named_buffers():
        torch.testing.assert_close(value, after[buffer], equal_nan=True)


def close(ours: list[dict], theirs: list[dict], tolerance: float):
    """All losses, norms and means of the steps agree, relative to their size."""
    for found, expected in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            if key.startswith(("loss", "grad_norm", "estimator_grad", "explained", "k_hat_mean")):
                assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (found["step"], key)


@pytest.mark.parametrize("name", CASES)
def test_a_training_is_the_dense_one(name):
    """60 steps with AuxK, clip, projection and a hard phase, in float64: in float32 the selection's gradient
    amplifies what is rounded in another order."""
    dense_run, dense = records(name, Exactly, path="dense")
    sparse_run, sparse = records(name, Exactly, path="sparse")
    assert {record["path"] for record in dense} == {"dense"}
    assert {record["path"] for record in sparse} == {"sparse"}
    assert any("loss_auxk" in record for record in sparse)
    assert sparse[-1]["skipped_steps"] == 0
    close(sparse, dense, 2e-4)
    for parameter, other in zip(dense_run.sae.parameters(), sparse_run.sae.parameters(), strict=True):
        torch.testing.assert_close(other, parameter, rtol=0, atol=1e-4)
    assert sparse[-1]["loss_reconstruction"] < 0.7 * sparse[0]["loss_reconstruction"]  # and it has learned


@pytest.mark.parametrize("name", ["topk", "topk-nested", "batchtopk", "msae", "adaptivek", "softsae-wide"])
def test_a_training_in_float32_begins_as_the_dense_one(name):
    """Eight steps of softsae, 60 of the others."""
    (_, dense), (_, sparse) = (records(name, path=path) for path in ("dense", "sparse"))
    steps = 8 if name == "softsae-wide" else 60
    close(sparse[:steps], dense[:steps], 1e-3)


@pytest.mark.parametrize("name", ["topk", "softsae-wide", "softsae-shared-scaled", "batchtopk", "msae"])
def test_products_in_bfloat16_are_those_of_copies(name):
    """Whether weights are rounded where they are used or by the optimizer, the training is the same."""
    rounded, sparse = records(name, path="sparse", dtype="bfloat16")
    run, kept = records(name, path="sparse", dtype="bfloat16", keep_copies=True)
    _, dense = records(name, path="dense", dtype="bfloat16")
    copies = {run.one_step.names[p]: copy for p, copy in run.optimizer.copies.items()}
    assert {"W_enc", "W_dec"} <= copies.keys() and not rounded.optimizer.copies
    for weight, copy in copies.items():
        master = run.sae.get_parameter(weight)
        assert master.dtype == torch.float32 and torch.equal(copy, master.bfloat16())
    assert [record["loss"] for record in sparse] == [record["loss"] for record in kept]
    for ours, theirs in zip(rounded.sae.parameters(), run.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    close(sparse[:3], dense[:3], 0.03)
    assert sparse[-1]["loss_reconstruction"] == pytest.approx(dense[-1]["loss_reconstruction"], rel=0.1)


class Sizes(TorchDispatchMode):
    """Records what is made within it with at least so many elements."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.made = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            new = isinstance(tensor, torch.Tensor) and not function._schema.is_mutable
            new = new and not any(a.alias_info for a in function._schema.returns)
            if new and tensor.numel() >= self.least:
                self.made.append((str(function), tuple(tensor.shape)))
        return result


@pytest.mark.parametrize("estimator", ["bottleneck", None])
@pytest.mark.parametrize("hard", [False, True])
def test_nothing_as_large_as_the_pre_activations_is_made_besides_them(estimator, hard):
    rows, d, n = 32, 8, 4096
    kind = {"architecture": "topk"} if estimator is None else {}
    if estimator:
        kind["softsae"] = SoftSAEConfig(estimator=EstimatorConfig(estimator, 8))
    sae = SparseAutoencoder(AutoencoderConfig(d=d, n=n, k=8, **kind))
    x = torch.randn(rows, d)
    squares = {name: torch.zeros(n) for name in ("W_enc", "W_dec")}
    how = Sparse(64, False, squares=squares, project=True)
    with Sizes(rows * n) as sizes:
        out = sae(x, Phase(1e-4, 8.0, hard, step=0), how=how)
        sum(out.losses.values()).backward()
    assert len(sizes.made) == 1 and sizes.made[0][1] in ((rows, n), (n, rows)), sizes.made
    with Sizes(rows * n) as sizes:
        out = sae(x, Phase(1e-4, 8.0, hard, step=0))
        sum(out.losses.values()).backward()
    assert len(sizes.made) > 3  # the dense path is seen
    for name, found in squares.items():
        assert found.any(), name


@pytest.mark.parametrize("name", ["topk", "topk-nested", "softsae-wide", "softsae-shared-scaled"])
def test_squares_are_the_norms_of_the_gradients(name):
    sae = autoencoder(name)
    own = [weight for weight in sae.selector.normed() if weight == "W_enc"]
    squares = {weight: torch.zeros(len(sae.b_enc)) for weight in ("W_dec", *own)}
    assert bool(own) == (name != "softsae-shared-scaled")
    x = SOURCE.sample(48, seed=2)[0].double()
    passed(sae, x, Phase(ALPHA, 8.0, False, step=1), Sparse(squares=squares, project=True))
    for weight, found in squares.items():
        gradient = sae.get_parameter(weight).grad
        torch.testing.assert_close(found, gradient.square().sum(1).float(), rtol=1e-5, atol=1e-9)
    along = (sae.W_dec.grad * sae.W_dec).sum(1).abs().max()
    assert along < 1e-9 * sae.W_dec.grad.abs().max()


def test_a_regularizer_keeps_a_training_dense_and_says_why():
    regularizer = RegularizerConfig(r1_weight=0.1)
    _, found = records("topk", path="sparse", steps=4, hard_steps=0, regularizer=regularizer)
    assert {record["path"] for record in found} == {"dense"}
    assert "regularizers" in found[0]["dense_because"]


def test_rules_without_a_sparse_path_say_so():
    for architecture in ("relu", "gated", "jumprelu", "featurechoice"):
        CASES["dense"] = AutoencoderConfig(n=64, k=8, architecture=architecture), {}
        try:
            _, found = records("dense", path="sparse", steps=2, hard_steps=0)
        finally:
            del CASES["dense"]
        assert found[0]["path"] == "dense" and found[0]["dense_because"]


def test_configurations_of_the_path():
    for field, wrong in (("path", "thin"), ("sparse_below", 2), ("cuda_graph", "yes"), ("keep_copies", 1)):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(TrainConfig(), **{field: wrong})
