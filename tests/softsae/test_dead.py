"""The list of dead latents, whose length the host knows in advance; AuxK over it."""

from __future__ import annotations

import pytest
import torch

from softsae import AutoencoderConfig, SparseAutoencoder
from softsae.dead import DeadLatents, DeadList, Revived, listed_length
from softsae.sparse import Sparse


@pytest.mark.parametrize("dead_after", [1, 40, 300, 10**6])
def test_the_list_holds_all_that_are_dead_although_its_length_is_known_a_refresh_before(dead_after):
    """1000 latents that fire at rates from 0 to 1/20, in batches of 10 to 25."""
    n, generator = 1000, torch.Generator().manual_seed(0)
    rates = torch.rand(n, generator=generator).pow(4) / 20
    tracker = DeadLatents(n, dead_after, most=25)
    most, expected = 0, torch.empty(0)
    for step in range(100):
        if step % 16 == 0:
            expected = (tracker.silent_for > dead_after).nonzero().squeeze(1)
        listed = tracker.refresh(step)
        assert listed.indices[listed.valid].tolist() == expected.tolist(), step
        assert len(listed.indices.unique()) == len(listed.indices)
        most = max(most, len(expected))
        samples = 10 + step % 16
        tracker.update(torch.rand(samples, n, generator=generator).lt(rates).any(0), samples)
    assert (most > 0) == (dead_after < 10**6)


def test_lengths_are_few_and_little_larger_than_needed():
    lengths = {listed_length(most, 10**6) for most in range(1, 70_000)}
    assert len(lengths) <= 65
    for most in range(65_536):
        assert most <= listed_length(most, 10**6) <= most + max(63, most / 8)
    assert listed_length(0, 500) == 0 and listed_length(450, 460) == 460


def test_the_tensors_of_the_list_stay_where_they_are_while_its_length_does():
    tracker = DeadLatents(200, dead_after=1, most=4)
    tracker.update(torch.arange(200) >= 3, 4)
    first = tracker.refresh(0)
    assert first.indices[first.valid].tolist() == [0, 1, 2]
    tracker.update(torch.arange(200) >= 5, 4)
    tracker.refresh(16)
    third = tracker.refresh(32)
    tracker.update(torch.arange(200) != 7, 4)
    fourth = tracker.refresh(48)
    assert third.indices is fourth.indices
    assert fourth.indices[fourth.valid].tolist() == [7]


def autoencoder() -> SparseAutoencoder:
    sae = SparseAutoencoder(AutoencoderConfig(d=6, n=40, k=3, architecture="topk"))
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-0.2, 0.2, 40))
    return sae


@pytest.mark.parametrize("sparse", [False, True])
def test_what_it_adds_is_the_gradient_of_auxk(sparse):
    """Of the loss over rows of the weights themselves, its padding without effect."""
    sae, x = autoencoder(), torch.randn(30, 6)
    dead = torch.tensor([2, 11, 19, 33])
    indices, valid = torch.tensor([2, 5, 11, 19, 33, 0]), torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    out = sae(x)
    expected = sae.auxk_loss(x, out.x_hat, dead)
    expected.backward()
    if sparse:
        sae.project_decoder_gradient()
    gradients = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad(set_to_none=True)
    for name in gradients:  # what other losses gave
        sae.get_parameter(name).grad = torch.full_like(gradients[name], 0.5)
    squares = {name: torch.zeros(40) for name in ("W_enc", "W_dec")}
    how = Sparse(squares=squares, project=True) if sparse else None
    revived = Revived(sae, DeadList(indices, valid), how)
    loss = revived.loss(x, out.reconstruction, None)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    revived.add_gradients()
    assert gradients.keys() == {"W_enc", "b_enc", "W_dec"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(sae.get_parameter(name).grad, gradient + 0.5)
    if sparse:
        for name, found in squares.items():
            norms = sae.get_parameter(name).grad.square().sum(1)
            torch.testing.assert_close(found[indices], norms[indices])
