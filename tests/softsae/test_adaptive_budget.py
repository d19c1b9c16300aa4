"""What SoftSAE is for: on activations with a known, varying number of factors, its budget follows it."""

from __future__ import annotations

import math

import pytest
import torch

from softsae import AutoencoderConfig, TrainConfig, Trainer, evaluate
from softsae.activations.synthetic import SyntheticSource
from softsae.metrics import dictionary_recovery, rank_correlation


@pytest.fixture(autouse=True)
def one_thread():
    """The products are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(source, **fields):
    train = TrainConfig(steps=400, batch_size=512, device="cpu")
    return Trainer(AutoencoderConfig(n=256, **fields), train, progress=False).fit(source)


def test_softsae_beats_topk_where_complexity_varies():
    source = SyntheticSource(d=64, features=128, min_active=1, max_active=16)
    x, factors = source.sample(8192, seed=1)
    soft = trained(source, k=8.0)
    adaptive = evaluate(soft, [x])
    budget = adaptive["l0"]["mean"]
    fixed = evaluate(trained(source, architecture="topk", k=math.ceil(budget)), [x])
    with torch.no_grad():
        followed = rank_correlation(soft(x).k_hat, factors)
    assert budget <= fixed["l0"]["mean"]
    assert adaptive["explained_variance"] > fixed["explained_variance"] + 0.02
    assert followed >= 0.8
    assert budget == pytest.approx(8, abs=0.8)
    assert dictionary_recovery(soft.W_dec, source.directions) > 0.97
