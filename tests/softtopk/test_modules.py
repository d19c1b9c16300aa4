"""The SoftTopK module: budgets and scales as numbers, shares and parameters."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from softtopk import SoftTopK, hard_topk, soft_topk
from softtopk.modules import spread


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_fixed_numbers_are_the_function():
    x = rand(3, 8, 5)
    for options in ({}, {"dim": 1}, {"largest": False}, {"hard": True}, {"backend": "reference"}):
        assert torch.equal(SoftTopK(2.5, 0.3, **options)(x), soft_topk(x, 2.5, 0.3, **options))
    assert torch.equal(SoftTopK(0.25, fraction=True, dim=1)(x), soft_topk(x, 2.0, dim=1))
    assert not SoftTopK(2).state_dict()


def test_a_budget_may_be_given_to_the_call():
    x, k = rand(3, 8), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    module = SoftTopK(4)
    assert torch.equal(module(x, k), soft_topk(x, k))
    module(x, k).square().sum().backward()
    assert k.grad.abs().min() > 0


def test_what_is_not_learned_may_be_set():
    module, x = SoftTopK(2), rand(8)
    module.alpha, module.k = 0.01, 3
    assert torch.equal(module(x), soft_topk(x, 3, 0.01))


@pytest.mark.parametrize("fraction,k", [(False, 2.5), (True, 0.3)])
def test_learned_k_and_alpha(fraction, k):
    """Gradient descent finds the budget and the scale behind given weights, from values far away."""
    x = rand(16, 10)
    want = soft_topk(x, k * (10 if fraction else 1), 0.4)
    module = SoftTopK(0.8 if fraction else 8, 2.0, fraction=fraction, learn_k=True, learn_alpha=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (module(x) - want).square().sum().backward()
        optimizer.step()
    assert module.budget(10).item() == pytest.approx(k * (10 if fraction else 1), abs=1e-3)
    assert module.scale(x).item() == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("fraction", [False, True])
def test_every_value_of_the_parameters_is_valid(fraction):
    module = SoftTopK(0.5, fraction=fraction, learn_k=True, learn_alpha=True)
    x = rand(2, 6)
    for value in (-80.0, -5.0, 0.0, 5.0, 80.0):
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, value)
        p = module(x)
        assert p.isfinite().all() and (p >= 0).all() and (p <= 1).all()


def test_state_dict_and_text():
    module = SoftTopK(0.25, 0.2, fraction=True, relative=True, learn_k=True, learn_alpha=True)
    assert sorted(module.state_dict()) == ["log_alpha", "logit_k"]
    other = SoftTopK(0.5, fraction=True, relative=True, learn_k=True, learn_alpha=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(rand(8)), module(rand(8)))
    assert repr(module) == (
        "SoftTopK(k=0.25, alpha=0.2, dim=-1, fraction=True, relative=True, learn_k=True, learn_alpha=True)"
    )
    assert repr(SoftTopK(32)) == "SoftTopK(k=32, alpha=0.1, dim=-1)"
    assert repr(SoftTopK(2, learn_k=True)) == "SoftTopK(k=2, alpha=0.1, dim=-1, learn_k=True)"


def test_relative_alpha_does_not_see_the_scale_of_x():
    module = SoftTopK(2, relative=True)
    x = rand(3, 8)
    p = module(x)
    assert torch.equal(p, soft_topk(x, 2, 0.1 * spread(x, -1)))
    for factor in (1e-20, 0.5, 1e25):
        torch.testing.assert_close(module(x * factor), p, atol=1e-5, rtol=0)
    torch.testing.assert_close(spread(x, 0), x.std(0, correction=0))


def test_relative_alpha_of_masked_and_constant_rows():
    masked = torch.cat([rand(1, 6), torch.full((1, 3), -torch.inf)], 1)
    torch.testing.assert_close(spread(masked, -1), masked[:, :6].std(-1, correction=0))
    module = SoftTopK(2, relative=True)
    assert torch.equal(module(masked)[:, 6:], torch.zeros(1, 3))
    for value in (0.0, 3.0, -1e30, 1e-30):
        assert torch.equal(module(torch.full((2, 8), value)), torch.full((2, 8), 0.25))
    assert module(torch.full((1, 3), -torch.inf)).eq(0).all()


def test_gradient_through_the_spread():
    x = rand(2, 6).double().requires_grad_()
    assert gradcheck(SoftTopK(2.5, 0.5, relative=True), x)


def test_half_precision():
    x = rand(2, 300).bfloat16()
    assert SoftTopK(0.1, fraction=True, relative=True, learn_k=True)(x).dtype == torch.bfloat16
    assert torch.equal(SoftTopK(30, hard=True)(x), hard_topk(x, 30))


def test_compile_and_deepcopy():
    import copy

    torch._dynamo.reset()
    module = SoftTopK(0.3, fraction=True, relative=True, learn_k=True, learn_alpha=True)
    x = rand(4, 10)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
