"""softtopk.budget against its formulas in double precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from softtopk.budget import budget, excess
from tests.waiting import record


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def scores(rows: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (3 * torch.randn(rows, generator=generator)).to(device).requires_grad_()


@pytest.mark.parametrize("rows", [1, 31, 1000, 5000])
def test_budget(device, rows):
    # Some are below the least, some above the most.
    score, shift = scores(rows, device), torch.tensor(0.3, device=device, requires_grad=True)
    options = 50.0, 4.0, 45.0
    with torch.no_grad():  # none where rounding decides whether it is beyond
        for bound in options[1:]:
            near = (torch.sigmoid(score.double() + shift) * options[0] - bound).abs() < 1e-3
            score[near] += 0.01
    k = budget(score, shift, *options)
    wide = [t.detach().double().requires_grad_() for t in (score, shift)]
    expected = (options[0] * torch.sigmoid(wide[0] + wide[1])).clamp(*options[1:])
    torch.testing.assert_close(k.double(), expected, rtol=2e-6, atol=0)
    g = torch.linspace(-1, 2, rows, device=device)
    got = torch.autograd.grad(k, (score, shift), g)
    wanted = torch.autograd.grad(expected, wide, g.double())
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-5)


def test_budget_keeps_what_is_not_a_number(device):
    score = torch.tensor([0.0, float("nan")], device=device)
    k = budget(score, torch.zeros((), device=device), 10.0, 1.0, 8.0)
    assert k[0] == 5 and k[1].isnan()


def test_budget_of_no_rows(device):
    score, shift = scores(0, device), torch.zeros((), device=device, requires_grad=True)
    budget(score, shift, 10.0, 1.0, 8.0).sum().backward()
    assert shift.grad == 0 and score.grad.shape == (0,)


@pytest.mark.parametrize("by_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("target", [-90.0, 0.0, 0.4, 70.0])
@pytest.mark.parametrize("rows", [1, 1025, 3000])
def test_excess(device, rows, target, by_tensor):
    k, beta = scores(rows, device), 1.5
    loss = excess(k, torch.tensor(target, device=device) if by_tensor else target, beta)
    wide = k.detach().double().requires_grad_()
    expected = F.softplus(wide.mean() - target, beta=beta)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-12)
    (got,) = torch.autograd.grad(2 * loss, k)
    (wanted,) = torch.autograd.grad(2 * expected, wide)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.gpu
def test_in_a_graph_without_waiting():
    score, shift = scores(300, "cuda"), torch.zeros((), device="cuda", requires_grad=True)
    target = torch.tensor(3.0, device="cuda")

    def step():
        k = budget(score, shift, 20.0, 1.0, 18.0)
        return k, *torch.autograd.grad(k.square().sum() + excess(k, target, 1.0), (score, shift))

    graph, results = record(step)
    with torch.no_grad():
        score.add_(1)
        target.fill_(5)
    graph.replay()
    for got, want in zip(results, step(), strict=True):
        assert torch.equal(got, want)
