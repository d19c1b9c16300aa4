"""Damaged, foreign and incomplete files are refused by name, and nothing half-written is left."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import softsae
from softsae import AutoencoderConfig, SparseAutoencoder, checkpoint
from softsae.autoencoder import FORMAT


@pytest.fixture
def saved(tmp_path):
    return SparseAutoencoder(AutoencoderConfig(d=4, n=8, k=2.0)).save(tmp_path / "sae")


def rewrite(file, change_tensors=lambda t: t, change_header=lambda h: h):
    tensors, header = checkpoint.read(file, FORMAT)
    checkpoint.write(file, change_tensors(tensors), change_header(header))


def refused(file, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        softsae.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    refused(saved, "truncated or no safetensors file")


def test_absent(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="sae.safetensors does not exist"):
        softsae.load(tmp_path)


def test_of_another_kind(tmp_path, saved):
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "is of format None, not 'softsae autoencoder 2'")
    rewrite(saved, change_header=lambda h: {**h, "format": "softsae autoencoder 9"})
    refused(saved, "softsae autoencoder 9")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {k: v for k, v in t.items() if k != "W_enc"}, "lacks W_enc"),
        (lambda t: {**t, "other": torch.zeros(1)}, "unknown tensors: other"),
        (lambda t: {**t, "b_dec": torch.zeros(5)}, r"b_dec of shape \(5,\), not \(4,\)"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    rewrite(saved, change_tensors=change)
    refused(saved, message)


@pytest.mark.parametrize(
    "change", [{"n": -1}, {"architecture": "dense"}, {"surprise": 1}, {"softsae": None}, {"d": None}]
)
def test_configuration_that_is_not_ours(saved, change):
    rewrite(saved, change_header=lambda h: {**h, "config": {**h["config"], **change}})
    refused(saved, "holds a configuration that is not ours")


def test_damaged_header(tmp_path):
    file = tmp_path / "damaged.safetensors"
    save_file({"weight": torch.zeros(2)}, file, metadata={checkpoint.HEADER: "{"})
    refused(file, "damaged header")


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        SparseAutoencoder(AutoencoderConfig(d=4, n=8, k=2.0)).save(saved)
    assert saved.read_bytes() == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["config.json", "sae.safetensors"]


def test_config_json_is_plain(saved):
    config = json.loads((saved.parent / "config.json").read_text())
    assert config["d"] == 4 and config["softsae"]["estimator"]["kind"] == "wide"
