"""The autoencoder as a whole: shapes and units, initialisation, decoder constraints, saving."""

from __future__ import annotations

import json

import pytest
import torch

import softsae
from softsae import AutoencoderConfig, EstimatorConfig, SparseAutoencoder
from softsae.architectures import ARCHITECTURES
from softsae.autoencoder import geometric_median
from tests.softsae.configs import model

D, N = 10, 32
NORMALIZATIONS = ("none", "unit_mean_square", "unit_mean_norm", "standardize")


def autoencoder(**fields) -> SparseAutoencoder:
    return SparseAutoencoder(model(**{"d": D, "n": N, "k": 4.0, **fields}), seed=3)


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 50 * torch.randn(200, D, generator=generator) * torch.arange(1, D + 1) + 300


@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 0, 3)])
@pytest.mark.parametrize("architecture", ["softsae", "topk"])
def test_any_leading_dimensions(lead, architecture):
    sae = autoencoder(architecture=architecture)
    x = torch.randn(*lead, D)
    out = sae(x)
    assert out.x_hat.shape == x.shape and out.latents.shape == (*lead, N) and out.k_hat.shape == lead
    flat = sae(x.reshape(-1, D))
    torch.testing.assert_close(out.x_hat.reshape(-1, D), flat.x_hat)
    torch.testing.assert_close(sae.encode(x), out.latents)
    torch.testing.assert_close(sae.decode(out.latents), out.x_hat)
    expected = (flat.x_hat - x.reshape(-1, D)).pow(2).sum(1).mean()
    torch.testing.assert_close(out.losses["reconstruction"], expected, equal_nan=True)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalisation_is_inside(normalization, x):
    sae = autoencoder(normalization=normalization)
    sae.initialize(x)
    rows = sae.normalize(x)
    if normalization == "unit_mean_square":
        assert rows.pow(2).mean().item() == pytest.approx(1, rel=1e-5)
    elif normalization == "unit_mean_norm":
        assert rows.pow(2).sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    elif normalization == "standardize":
        torch.testing.assert_close(rows.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.std(0, correction=0), torch.ones(D))
    else:
        assert torch.equal(rows, x)
    # All latents kept and W_enc the pseudo-inverse's two signs: x_hat must be x, in x's units.
    whole = autoencoder(normalization=normalization, architecture="topk", n=2 * D, k=2 * D)
    whole.initialize(x)
    with torch.no_grad():
        eye = torch.eye(D)
        whole.W_enc.copy_(torch.cat([eye, -eye]))
        whole.W_dec.copy_(whole.W_enc)
    before = x.clone()
    torch.testing.assert_close(whole(x).x_hat, x, rtol=1e-4, atol=1e-2)
    assert torch.equal(x, before)  # the input is not divided in place
    a = torch.cat([whole.normalize(x) - whole.b_dec, whole.b_dec - whole.normalize(x)], 1)
    torch.testing.assert_close(whole.pre_activations(x), a, rtol=1e-4, atol=1e-4)


def test_standardize_leaves_a_constant_dimension_alone(x):
    x[:, 3] = 7.0
    sae = autoencoder(normalization="standardize")
    sae.initialize(x)
    assert sae.scale[3] == 1 and sae(x).x_hat.isfinite().all()


def test_half_precision_input_comes_back_in_its_dtype(x):
    sae = autoencoder()
    sae.initialize(x)
    low = sae(x.bfloat16())
    assert low.x_hat.dtype == torch.bfloat16 and low.latents.dtype == torch.float32
    torch.testing.assert_close(low.x_hat, sae(x.bfloat16().float()).x_hat.bfloat16())


def test_start_of_the_weights():
    sae = autoencoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert torch.equal(sae.selector.estimator.W, sae.W_enc)
    assert torch.equal(autoencoder().W_dec, sae.W_dec)
    assert not sae.b_enc.any() and not sae.b_dec.any()


def test_gradient_of_b_dec_is_that_of_the_formula():
    sae = autoencoder(architecture="topk")
    x = torch.randn(30, D)
    sae(x).losses["reconstruction"].backward()
    mask = (sae.encode(x) != 0).detach()
    b_dec = sae.b_dec.detach().clone().requires_grad_()
    a = torch.relu((x - b_dec) @ sae.W_enc.detach().T + sae.b_enc.detach()) * mask
    ((a @ sae.W_dec.detach() + b_dec - x) ** 2).sum(1).mean().backward()
    torch.testing.assert_close(sae.b_dec.grad, b_dec.grad, rtol=1e-4, atol=1e-4)


def test_decoder_projection_and_norm():
    sae = autoencoder()
    sae(torch.randn(20, D)).losses["reconstruction"].backward()
    before = sae.W_dec.grad.clone()
    sae.project_decoder_gradient()
    parallel = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert (before * sae.W_dec).sum(1).abs().max() > 1e-2
    torch.testing.assert_close(parallel, torch.zeros(N), atol=1e-5, rtol=0)
    removed = before - sae.W_dec.grad
    torch.testing.assert_close(removed, (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(N, 1) + 0.5)
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))


def test_geometric_median():
    points = torch.randn(301, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    points[:20] += 1e4  # outliers, which the mean would follow
    median = geometric_median(points)
    away = points - median
    pull = (away / away.norm(dim=1, keepdim=True)).sum(0)  # 0 at the minimum
    assert pull.norm() < 1e-2
    line = torch.tensor([[0.0], [1.0], [2.0], [50.0], [60.0]])
    assert geometric_median(line).item() == pytest.approx(2.0, abs=0.05)
    assert geometric_median(torch.ones(4, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        *({"architecture": name} for name in ARCHITECTURES if name != "softsae"),
        {"architecture": "batchtopk", "matryoshka": [0.5, 0.5]},
        {"estimator": EstimatorConfig("bottleneck", 7), "alpha": 0.5},
    ],
)
def test_saved_and_loaded_is_the_same(tmp_path, x, name, fields):
    sae = autoencoder(**fields)
    sae.initialize(x)
    sae(x, sae.inference_phase(True)._replace(step=0))  # what a rule keeps of training
    file = sae.save(tmp_path / name)
    assert [p for p in tmp_path.rglob("*") if "tmp" in p.name] == []
    for path in (tmp_path / name, file):
        loaded = softsae.load(path)
        assert loaded.config == sae.config and not loaded.training
        assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    if name == "folder":
        assert json.loads((tmp_path / name / "config.json").read_text())["k"] == 4.0


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(3, D + 1), ValueError, r"x of shape \(3, 11\) must end in d=10"),
        (torch.tensor(1.0), ValueError, r"shape \(\)"),
        (torch.zeros(3, D, dtype=torch.int64), TypeError, "torch.int64"),
        ([1.0], TypeError, "list"),
        (torch.zeros(3, D, device="meta"), ValueError, "x is on meta, the autoencoder on cpu"),
    ],
)
def test_wrong_input_is_refused(x, error, message):
    for method in ("__call__", "encode", "pre_activations"):
        with pytest.raises(error, match=message):
            getattr(autoencoder(), method)(x)


def test_wrong_latents_and_missing_width_are_refused():
    with pytest.raises(ValueError, match=r"latents of shape \(2, 5\) must end in n=32"):
        autoencoder().decode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="d=None"):
        SparseAutoencoder(AutoencoderConfig())


def test_matryoshka_trains_every_prefix_and_changes_nothing_at_inference(x):
    nested = autoencoder(architecture="topk", matryoshka=[0.25, 0.25, 0.5])
    plain = autoencoder(architecture="topk")
    phase = nested.inference_phase(True)
    out = nested(x, phase._replace(step=0))
    latents = out.latents
    ends = nested.config.prefixes()
    each = [(x - latents[:, :m] @ nested.W_dec[:m] - nested.b_dec).pow(2).sum(1).mean() for m in ends]
    torch.testing.assert_close(out.losses["reconstruction"], sum(each) / 3)
    assert torch.equal(nested(x).x_hat, plain(x).x_hat)
    assert torch.equal(nested(x).losses["reconstruction"], plain(x).losses["reconstruction"])
