"""Codes at inference: of tensors, and of stored activations to a folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import softsae
from softsae import AutoencoderConfig, SparseAutoencoder
from softsae.activations.synthetic import SyntheticSource
from softtopk import SparseCode
from tests.softsae import command

D, N = 16, 200
ARCHITECTURES = (
    "softsae", "topk", "batchtopk", "featurechoice", "msae", "adaptivek", "jumprelu", "relu", "gated",
)  # fmt: skip


def model(architecture: str = "softsae") -> SparseAutoencoder:
    sae = SparseAutoencoder(AutoencoderConfig(d=D, n=N, k=6, architecture=architecture)).eval()
    if hasattr(sae.selector, "steps"):
        sae.selector.threshold.fill_(0.8)
    return sae


@pytest.mark.parametrize("k", [None, 3, "each"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sparse_code_holds_the_latents(architecture, k):
    sae, x = model(architecture), torch.randn(4, 9, D)
    k = torch.arange(36).view(4, 9) if k == "each" else k
    code, latents = sae.encode(x, k=k, sparse=True), sae.encode(x, k=k)
    assert isinstance(code, SparseCode) and tuple(code.shape) == (4, 9, N)
    torch.testing.assert_close(code.to_dense(), latents, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.decode(code), sae.decode(latents), rtol=1e-5, atol=1e-5)
    if k is None:
        torch.testing.assert_close(sae.decode(code), sae(x).x_hat, rtol=1e-5, atol=1e-5)


def test_a_soft_code_is_the_soft_latents():
    sae, x = model(), torch.randn(30, D)
    code, latents = sae.encode(x, hard=False, sparse=True), sae.encode(x, hard=False)
    torch.testing.assert_close(code.to_dense(), latents, rtol=1e-4, atol=1e-5)


def test_a_code_of_another_dictionary_is_refused():
    code = SparseCode.from_dense(torch.eye(5))
    with pytest.raises(ValueError, match="must end in n=200"):
        model().decode(code)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 100, 257])
def test_stored_activations_become_a_folder_of_codes(tmp_path, rows, dtype):
    sae, x = model(), torch.randn(rows, D)
    np.save(tmp_path / "x.npy", x.numpy())
    out = softsae.encode_source(
        sae, tmp_path / "x.npy", tmp_path / "codes", batch_size=32, shard_rows=64, dtype=dtype
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"] == rows and len(manifest["shards"]) == -(-rows // 64)
    codes = list(softsae.read_codes(out))
    assert [len(code.counts) for code in codes] == [shard["rows"] for shard in manifest["shards"]]
    found, expected = torch.cat([code.to_dense() for code in codes]), sae.encode(x)
    tolerance = 0 if dtype == "float32" else 2**-8
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(
        torch.cat([sae.decode(code) for code in codes]), sae.decode(found), rtol=1e-5, atol=1e-5
    )


def test_an_autoencoder_encodes_in_its_own_dtype(tmp_path):
    sae, x = model().bfloat16(), torch.randn(70, D)
    out = softsae.encode_source(sae, x, tmp_path / "codes", batch_size=32)
    found = torch.cat([code.to_dense() for code in softsae.read_codes(out)])
    assert torch.equal(found, torch.cat([sae.encode(part.bfloat16()) for part in x.split(32)]).float())


def test_what_cannot_be_encoded_is_refused_and_leaves_nothing(tmp_path):
    sae, out = model(), tmp_path / "codes"
    with pytest.raises(ValueError, match="activations have d=5, the autoencoder d=16"):
        softsae.encode_source(sae, torch.randn(9, 5), out)
    with pytest.raises(ValueError, match="limit=None"):
        softsae.encode_source(sae, SyntheticSource(D, 8, 1, 3), out)
    with pytest.raises(ValueError, match="dtype='int8'"):
        softsae.encode_source(sae, SyntheticSource(D, 8, 1, 3), out, dtype="int8", limit=2)
    x = torch.randn(70, D)
    x[40, 3] = torch.nan
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(ValueError, match="NaN or infinity"):
        softsae.encode_source(sae, tmp_path / "x.npy", out, batch_size=32)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.npy"]
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        next(softsae.read_codes(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "else"}')
    with pytest.raises(ValueError, match="format 'else'"):
        next(softsae.read_codes(tmp_path))
    with pytest.raises(FileExistsError, match="not empty"):
        softsae.encode_source(sae, torch.randn(4, D), tmp_path)


def test_an_endless_source_is_encoded_as_far_as_asked(tmp_path):
    out = softsae.encode_source(
        model(), SyntheticSource(D, 8, 1, 3), tmp_path / "codes", batch_size=8, limit=3, k=2
    )
    (code,) = softsae.read_codes(out)
    assert code.counts.tolist() == [2] * 24


def test_the_command(tmp_path):
    sae, x = model("topk"), torch.randn(50, D)
    sae.save(tmp_path / "sae")
    np.save(tmp_path / "x.npy", x.numpy())
    arguments = ("--activations", tmp_path / "x.npy", "--device", "cpu")
    said, _ = command.run("encode", tmp_path / "sae", *arguments, "--out", tmp_path / "codes")
    assert "50 codes with 6.0 latents each" in said
    (code,) = softsae.read_codes(tmp_path / "codes")
    torch.testing.assert_close(code.to_dense(), sae.encode(x), rtol=0, atol=1e-6)
    _, error = command.run("encode", tmp_path / "sae", *arguments, "--out", tmp_path / "codes", status=2)
    assert "not empty" in error
    command.run("encode", tmp_path / "sae", *arguments, "--out", tmp_path / "few", "--k", 2)
    (code,) = softsae.read_codes(tmp_path / "few")
    assert code.counts.tolist() == [2] * 50
