"""What a step needs of memory besides parameters, gradients and the optimizer's state.

On the CPU, whose optimizer is left out: it has temporaries of its own.
"""

from __future__ import annotations

import pytest
import torch

from softsae import AutoencoderConfig, EstimatorConfig, SoftSAEConfig, TrainConfig, Trainer
from softtopk.backends import projection
from tests.softsae.allocations import peak_bytes


class Width:
    def __init__(self, d: int):
        self.d = d


def beyond(monkeypatch, rows: int, d: int, n: int, estimator: str | None = "wide", **train) -> int:
    """Bytes of a step of SoftSAE or, without an estimator, of TopK, gradients not counted."""
    for name in ("CHUNK_BYTES", "PRODUCT_BYTES"):
        monkeypatch.setattr(projection, name, 1 << 16)
    kind = {"architecture": "topk"} if estimator is None else {}
    if estimator is not None:
        kind["softsae"] = SoftSAEConfig(alpha=1e-4, estimator=EstimatorConfig(estimator))
    options = TrainConfig(steps=10_000, batch_size=rows, dtype="bfloat16", device="cpu", **train)
    run = Trainer(AutoencoderConfig(n=n, k=8, **kind), options, progress=False)
    run.start(Width(d))
    batch = torch.randn(rows, d, generator=torch.Generator().manual_seed(0))
    run.initialize(batch, None)
    run.optimizer.step = lambda **_: None
    run.train_step(batch, False)
    run.optimizer.zero_grad(set_to_none=True)
    most = peak_bytes(lambda: run.train_step(batch, False))
    gradients = sum(p.grad.nbytes for p in run.sae.parameters())
    assert gradients == 4 * sum(p.numel() for p in run.sae.parameters())
    return most - gradients


def test_a_measured_peak():
    def work():
        a = torch.zeros(1000)
        del a
        b = torch.zeros(500)
        return b + torch.zeros(500)

    assert peak_bytes(work) == 6000
    assert peak_bytes(lambda: None) == 0


@pytest.mark.parametrize("estimator", ["wide", "bottleneck", None])
def test_a_dense_step_has_few_matrices_of_latents(monkeypatch, estimator):
    """In eighths less than one and a half, where a pass of the whole batch has five and more."""
    rows, d, n = 2048, 32, 2048
    shape = (monkeypatch, rows, d, n, estimator)
    apart = beyond(*shape, path="dense", rows_at_a_time=rows // 8)
    whole = beyond(*shape, path="dense", rows_at_a_time=rows)
    latents = 2 * rows * n
    assert apart < 1.5 * latents and whole > 4.5 * latents and apart < whole / 3


@pytest.mark.parametrize("estimator", ["wide", "bottleneck", None])
def test_a_sparse_step_keeps_no_copies(monkeypatch, estimator):
    """Weights far larger than the batch: at the peak there is no room for one of them in bfloat16."""
    rows, d, n = 64, 256, 4096
    shape = (monkeypatch, rows, d, n, estimator)
    most = beyond(*shape, path="sparse")
    assert most < 2 * n * d
