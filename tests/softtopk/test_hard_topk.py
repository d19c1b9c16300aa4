"""hard_topk on every backend: masks, indices, counts, ties, rounding, per-row budgets."""

from __future__ import annotations

import pytest
import torch
from torch import inf, nan

from softtopk import hard_topk, soft_topk
from softtopk.functional import FLOATS
from tests.cases import FAMILIES, make


@pytest.mark.parametrize("n", [1, 2, 31, 1000, 5000])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_a_stable_sort(backend, device, family, n, dtype):
    k = torch.tensor([0, 1, 1.5, n / 3, n - 0.75, n])
    x = make(family, len(k), n, seed=n).to(dtype)
    count = (k + 0.5).floor().clamp(max=n).long()
    order = x.sort(dim=1, descending=True, stable=True).indices
    want = torch.zeros(x.shape).scatter(1, order, (torch.arange(n) < count[:, None]).float())
    mask = hard_topk(x.to(device), k.to(device), backend=backend)
    assert mask.dtype == dtype and torch.equal(mask.cpu().float(), want)

    values, indices, counts = hard_topk(
        x.to(device), k.to(device), max_k=n, return_indices=True, backend=backend
    )
    assert counts.tolist() == count.tolist()
    for r in range(len(k)):
        chosen = want[r].nonzero().flatten()
        assert indices[r, : len(chosen)].tolist() == chosen.tolist()
        assert torch.equal(values[r, : len(chosen)].cpu(), x[r, chosen])
        assert (indices[r, len(chosen) :] == -1).all() and (values[r, len(chosen) :] == 0).all()


def test_max_k_keeps_the_largest(backend, device):
    x = torch.tensor([[1.0, 5.0, 3.0, 5.0, 4.0]], device=device)
    values, indices, counts = hard_topk(
        x, torch.tensor([4], device=device), max_k=2, return_indices=True, backend=backend
    )
    assert indices.tolist() == [[1, 3]] and values.tolist() == [[5, 5]] and counts.tolist() == [2]
    _, indices, counts = hard_topk(x, 2, max_k=7, return_indices=True, backend=backend)
    assert indices.tolist() == [[1, 3, -1, -1, -1, -1, -1]] and counts.tolist() == [2]


def test_infinities_and_nan(backend, device):
    x = torch.tensor(
        [[inf, 1, -inf, 2], [inf, inf, inf, 0], [-inf, -inf, 1, 0], [nan, 1, 2, 3]], device=device
    )
    k = torch.tensor([4.0, 1.0, 3.0, 2.0], device=device)
    mask = hard_topk(x, k, backend=backend).cpu()
    assert mask[:3].tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1]] and mask[3].isnan().all()
    _, indices, counts = hard_topk(x, k, max_k=4, return_indices=True, backend=backend)
    assert counts.tolist() == [3, 3, 2, 0] and indices[3].tolist() == [-1] * 4


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("n", [40, 5000, 20000, 70001])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_the_same_without_a_gradient(backend, device, dtype, n, largest):
    x = torch.stack([make(family, 1, n, seed=n)[0] for family in FAMILIES]).to(dtype).to(device)
    x[:2, ::3] = -x[:2, ::3]  # -0 too
    x[3, n // 2] = nan
    k = torch.linspace(1, n if n < 100 else 150, len(x), device=device)
    got, want = (
        hard_topk(y, k, max_k=160, largest=largest, return_indices=True, backend=backend)
        for y in (x, x.clone().requires_grad_())
    )
    assert want[0].requires_grad and not got[0].requires_grad
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def test_gradient_of_the_values(backend, device):
    x = torch.randn(3, 50, device=device, requires_grad=True)
    values, indices, _ = hard_topk(x, 5, return_indices=True, backend=backend)
    weight = torch.randn(3, 5, device=device)
    (values * weight).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x).scatter(1, indices, weight))


def test_straight_through(backend, device):
    x = torch.randn(2, 60, device=device)
    k = torch.tensor([3.5, 7.0], device=device)
    v = torch.randn(2, 60, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, k)]
    hard = soft_topk(*leaves, 0.2, hard=True, backend=backend)
    assert torch.equal(hard, hard_topk(x, k, backend=backend)) and hard.sum(1).tolist() == [4, 7]
    got = torch.autograd.grad(hard, leaves, v)
    want = torch.autograd.grad(soft_topk(*leaves, 0.2, backend=backend), leaves, v)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_smallest(backend, device):
    x = torch.tensor([[3.0, 1.0, 2.0, 1.0]], device=device)
    assert hard_topk(x, 2, largest=False, backend=backend).tolist() == [[0, 1, 0, 1]]
    assert hard_topk(x, 1, largest=False, backend=backend).tolist() == [[0, 1, 0, 0]]
