"""The corners that every architecture must survive, new ones included: AuxK, bounds, nothing active."""

from __future__ import annotations

import pytest
import torch

import softsae
from softsae import AutoencoderConfig, RegularizerConfig, RunConfig, SparseAutoencoder, TrainConfig, Trainer
from softsae.activations import as_source
from softsae.architectures import ARCHITECTURES
from softsae.config import resolve
from softsae.schedules import Schedule

D, N, B = 10, 32, 16
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def autoencoder(architecture: str, k: float = 4.0, n: int = N) -> SparseAutoencoder:
    """One that has seen a batch: thresholds that follow training are known, probes fitted."""
    config = AutoencoderConfig(d=D, n=n, k=k, architecture=architecture)
    sae = SparseAutoencoder(config, seed=1).train()
    with torch.no_grad():
        sae.b_enc.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(2))
        sae.b_dec.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3))
        seen = samples(64, seed=5)
        sae.selector.prepare(sae, seen, as_source(seen), seed=1)
        sae(seen, phases(sae)[0])
    return sae


def samples(count: int = B, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def phases(sae: SparseAutoencoder) -> list:
    """The first and the last phase of a training with everything that can be asked for."""
    both = RegularizerConfig(r1_weight=0.1, r2_weight=0.1)
    train = TrainConfig(steps=10, hard_steps=1)
    if ARCHITECTURES[sae.config.architecture][0].top_k:
        train.regularizer = both
    schedule = Schedule(resolve(RunConfig(sae.config, train), D))
    return [schedule.phase(0), schedule.phase(9)]


def all_finite(sae: SparseAutoencoder, x: torch.Tensor, dead: torch.Tensor) -> bool:
    """Losses and gradients of both phases, AuxK with them."""
    for phase in phases(sae):
        sae.zero_grad(set_to_none=True)
        out = sae(x, phase)
        terms = {**out.losses, "auxk": sae.auxk_loss(x, out.x_hat, dead)}
        sum(terms.values()).backward()
        values = [*terms.values(), out.x_hat, out.latents, out.k_hat]
        values += [p.grad for p in sae.parameters() if p.grad is not None]
        if not all(value.isfinite().all() for value in values):
            return False
    return True


NONE = torch.empty(0, dtype=torch.int64)
SOME = torch.arange(0, N, 5)
WHOLE = torch.arange(N)


@EVERY
@pytest.mark.parametrize("dead", [SOME, WHOLE], ids=["some", "all"])
def test_auxk_reaches_the_encoder_and_not_the_bias(architecture, dead):
    sae, x = autoencoder(architecture), samples()
    out = sae(x, phases(sae)[1])
    loss = sae.auxk_loss(x, out.x_hat, dead)
    loss.backward()
    alive = torch.ones(N, dtype=torch.bool).index_fill(0, dead, False)
    for gradient in (sae.W_enc.grad, sae.b_enc.grad, sae.W_dec.grad):
        assert gradient[dead].abs().sum() > 0
        assert not gradient[alive].any()
    assert sae.b_dec.grad is None
    assert all(p.grad is None for p in sae.selector.parameters())
    error = (x - out.x_hat).detach()
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc[dead].T + sae.b_enc[dead])
    order = pre.sort(dim=1, descending=True).values
    kept = pre * (pre >= order[:, [min(D // 2, len(dead)) - 1]])
    expected = (error - kept @ sae.W_dec[dead]).pow(2).sum() / (error - error.mean(0)).pow(2).sum()
    torch.testing.assert_close(loss, expected)


@EVERY
def test_auxk_without_dead_latents_is_the_error_as_it_is(architecture):
    sae, x = autoencoder(architecture), samples()
    error = (x - sae(x).x_hat).detach()
    loss = sae.auxk_loss(x, sae(x).x_hat, NONE)
    torch.testing.assert_close(loss, error.pow(2).sum() / (error - error.mean(0)).pow(2).sum())
    loss.backward()
    assert sae.W_enc.grad is None or not sae.W_enc.grad.any()


@EVERY
@pytest.mark.parametrize("dead", [NONE, SOME, WHOLE], ids=["none", "some", "all"])
@pytest.mark.parametrize("count", [1, 2, B])
def test_gradients_are_finite_whatever_is_dead_and_however_small_the_batch(architecture, dead, count):
    sae = autoencoder(architecture)
    assert all_finite(sae, samples(count), dead)
    assert sae.W_dec.grad.any()


@EVERY
@pytest.mark.parametrize("dead", [NONE, WHOLE], ids=["none", "all"])
def test_nothing_active(architecture, dead):
    sae, x = autoencoder(architecture), samples()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    assert all_finite(sae, x, dead)
    for out in (sae(x, phases(sae)[0]), sae(x, phases(sae)[1]), sae(x), sae(x, k=5)):
        assert not out.latents.any()
        torch.testing.assert_close(out.x_hat, sae.b_dec.expand(B, D))


@EVERY
def test_the_same_sample_over_and_over(architecture):
    sae = autoencoder(architecture)
    assert all_finite(sae, samples(1).expand(B, D).contiguous(), SOME)
    assert all_finite(sae, torch.zeros(B, D), SOME)


@EVERY
@pytest.mark.parametrize("k", [0.5, 1, N - 0.5, N])
def test_k_at_its_bounds(architecture, k):
    if architecture == "softsae":
        k = min(max(k, 1), N - 0.5)  # k_min = 1 <= k < k_max = n
    sae, x = autoencoder(architecture, k=k), samples()
    assert all_finite(sae, x, SOME)
    out = sae(x)
    active = (out.latents != 0).sum(1)
    assert (active <= N).all() and ((out.k_hat >= 0) & (out.k_hat <= N)).all()
    if ARCHITECTURES[architecture][0].top_k and k == N:
        torch.testing.assert_close(sae(x, phases(sae)[1]).latents, torch.relu(sae.pre_activations(x)))


@pytest.mark.parametrize("bound, share", [("k_max", 1), ("k_min", -1)])
def test_k_hat_at_its_bounds(bound, share):
    sae, x = autoencoder("softsae"), samples()
    with torch.no_grad():
        sae.selector.estimator.c2.fill_(share * 1e4)
    assert all_finite(sae, x, SOME)
    expected = getattr(sae.config.softsae, bound)
    for out in (sae(x), sae(x, phases(sae)[0])):
        assert out.k_hat.tolist() == [expected] * B
    assert ((sae.encode(x) != 0).sum(1) <= expected).all()
    assert sae.encode(x).any()


@EVERY
def test_a_sample_is_encoded_as_it_is_alone(architecture):
    sae, x = autoencoder(architecture).eval().double(), samples(40).double()
    together = sae(x)
    assert together.latents.any()
    for i in (0, 17, 39):
        alone = sae(x[i : i + 1])
        torch.testing.assert_close(alone.latents[0], together.latents[i])
        torch.testing.assert_close(alone.x_hat[0], together.x_hat[i])
        assert torch.equal(alone.latents[0] != 0, together.latents[i] != 0)
    reordered = sae(x.flip(0)).latents.flip(0)
    torch.testing.assert_close(reordered, together.latents)


@EVERY
def test_inference_changes_nothing_that_is_kept(architecture):
    sae = autoencoder(architecture)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae(samples()), sae.encode(samples()), sae(samples(), k=3)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@EVERY
def test_saved_and_loaded_is_the_same(architecture, tmp_path):
    sae, x = autoencoder(architecture), samples()
    sae.save(tmp_path / "sae")
    loaded = softsae.load(tmp_path / "sae")
    assert loaded.config == sae.config
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sae.state_dict().items())
    for given in ({}, {"k": 3}):
        left, right = sae(x, **given), loaded(x, **given)
        assert torch.equal(left.latents, right.latents) and torch.equal(left.x_hat, right.x_hat)


@EVERY
@pytest.mark.parametrize("batch_size, dead_after", [(1, 1), (1, 10**6), (8, 1)])
def test_training_stays_finite_with_everything_dead_and_with_batches_of_one(
    architecture, batch_size, dead_after
):
    train = TrainConfig(
        steps=40, batch_size=batch_size, lr=1e-2, hard_steps=10, dead_after=dead_after, device="cpu"
    )
    if ARCHITECTURES[architecture][0].top_k:
        train.regularizer = RegularizerConfig(r1_weight=0.01, r2_weight=0.01)
    config = AutoencoderConfig(n=N, k=4, architecture=architecture)
    run = Trainer(config, train, progress=False)
    sae = run.fit(samples(200, seed=9))
    finite = [value.isfinite().all() for value in sae.state_dict().values()]
    assert all(finite)
    kept_alive = architecture == "featurechoice" and batch_size == 8  # every latent gets some sample
    assert run.dead.listed.any() == (dead_after == 1 and not kept_alive)
