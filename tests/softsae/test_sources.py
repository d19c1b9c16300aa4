"""Tensors, iterators and synthetic activations as sources."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from softsae.activations.synthetic import SyntheticSource
from softsae.activations.tensors import IteratorSource, TensorSource


def take(source, count, batch_size, seed=0, start=0):
    return list(islice(source.batches(batch_size, seed, start), count))


def same(a, b):
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


@pytest.mark.parametrize("batch_size", [3, 7, 10, 25])
def test_tensor_epochs_are_permutations_and_start_resumes(batch_size):
    source = TensorSource(torch.arange(10.0).unsqueeze(1))
    batches = take(source, 20, batch_size)
    rows = torch.cat(batches).squeeze(1)
    epochs = rows[: len(rows) // 10 * 10].reshape(-1, 10)
    assert (epochs.sort(1).values == torch.arange(10.0)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)
    assert all(batch.shape == (batch_size, 1) for batch in batches)
    for start in (1, 4, 13):
        assert same(batches[start:], take(source, 20 - start, batch_size, start=start))
    assert not same(batches, take(source, 20, batch_size, seed=1))


def test_tensor_of_half_precision_is_served_as_float32():
    assert take(TensorSource(torch.ones(4, 2).bfloat16()), 1, 2)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "x, error",
    [(torch.ones(3), ValueError), (torch.ones(0, 3), ValueError), (torch.ones(2, 2).int(), TypeError)],
)
def test_tensor_that_is_no_matrix_of_floats(x, error):
    for make in (TensorSource, lambda x: IteratorSource([x])):
        with pytest.raises(error, match="shape|dtype"):
            make(x)


def test_iterable_is_rebatched_repeated_and_resumed():
    pieces = list(torch.arange(12.0).reshape(12, 1).split([5, 1, 6]))
    source = IteratorSource(pieces)
    batches = take(source, 7, 4)
    assert torch.cat(batches).squeeze(1).tolist() == [*range(12), *range(12), *range(4)]
    assert same(batches[2:], take(source, 5, 4, start=2))


def test_one_shot_iterator_is_read_once():
    source = IteratorSource(torch.full((4, 2), float(i)) for i in range(3))
    assert [batch[0, 0].item() for batch in source.batches(4, 0)] == [0, 1, 2]
    with pytest.raises(ValueError, match="already consumed"):
        next(source.batches(4, 0))


def test_iterator_of_other_things():
    with pytest.raises(TypeError, match="yields int"):
        IteratorSource([1, 2])
    with pytest.raises(TypeError, match="yields nothing"):
        IteratorSource(iter([]))
    with pytest.raises(ValueError, match="d=3, the first had 2"):
        take(IteratorSource([torch.ones(2, 2), torch.ones(2, 3)]), 2, 2)


def test_synthetic_activations_are_sums_of_the_labelled_number_of_features():
    source = SyntheticSource(d=32, features=20, min_active=2, max_active=6, seed=4)
    x, active = source.sample(4000, seed=1)
    codes = torch.linalg.lstsq(source.directions.T.double(), x.T.double()).solution.T / source.scale
    present = codes.abs() > 1e-4
    assert torch.equal(present.sum(1), active)
    assert codes[present].min() > 0.5 - 1e-4 and codes[present].max() < 1.5 + 1e-4
    counts = active.bincount(minlength=7)[2:]
    assert counts.sum() == 4000 and counts.min() > 4000 / 5 * 0.85
    assert present.double().mean(0).sub(4 / 20).abs().max() < 0.03  # every feature alike
    assert x.pow(2).mean().item() == pytest.approx(1, rel=0.02)


def test_synthetic_equal_norm_and_constant_number():
    source = SyntheticSource(16, 30, 3, 3, equal_norm=True)
    x, active = source.sample(100, seed=0)
    torch.testing.assert_close(x.norm(dim=1), torch.full((100,), 4.0))
    assert (active == 3).all()


def test_synthetic_batches_depend_on_seed_and_number_only():
    source = SyntheticSource(8, 12, 1, 4)
    batches = take(source, 6, 5)
    assert same(batches[2:], take(source, 4, 5, start=2))
    assert not same(batches, take(source, 6, 5, seed=1))
    assert not torch.equal(batches[0], batches[1])


def test_synthetic_bounds():
    with pytest.raises(ValueError, match="min_active=3, max_active=2"):
        SyntheticSource(8, 12, 3, 2)
    with pytest.raises(ValueError, match="features=12"):
        SyntheticSource(8, 12, 1, 13)
