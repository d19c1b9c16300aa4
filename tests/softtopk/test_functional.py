"""The public function: gradcheck, shapes, dims, strides, dtypes of k and alpha, threshold, dispatch."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch.autograd import gradcheck

import softtopk
from softtopk import dispatch, functional, modules, soft_topk


def double(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def check_gradients(function, inputs, backend):
    """gradcheck; for Triton, whose interpreter takes a tenth of a second a row, along random directions."""
    assert gradcheck(function, inputs, eps=1e-7, atol=1e-5, fast_mode=backend == "triton")


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.05])
def test_gradcheck(backend, device, alpha, largest):
    x = double(4, 9).to(device).requires_grad_()
    k = torch.tensor([0.5, 2, 4.3, 8.6], dtype=torch.float64, device=device, requires_grad=True)
    scale = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64, device=device) * alpha
    scale.requires_grad_()
    check_gradients(lambda *a: soft_topk(*a, largest=largest, backend=backend), (x, k, scale), backend)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_any_dim_with_broadcast_k_and_alpha(backend, device, dim):
    """Gradients of broadcast k and alpha are summed to their shapes."""
    x = double(3, 4, 5, seed=1).to(device)
    row_shape = x.movedim(dim, -1).shape[:-1]
    k = (torch.rand(1, row_shape[1], dtype=torch.float64) * 2 + 0.1).to(device).requires_grad_()
    alpha = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    x.requires_grad_()
    check_gradients(lambda *a: soft_topk(*a, dim=dim, backend=backend), (x, k, alpha), backend)
    p = soft_topk(x, k, alpha, dim=dim, backend=backend)
    torch.testing.assert_close(p.sum(dim), k.expand(row_shape))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:, 1:],
        lambda x: x[:, ::2],
        lambda x: x[::3, 3:-2],
        lambda x: x[:, :9].t(),
        lambda x: x[:1].expand(5, -1),
        lambda x: x[:, :1].expand(-1, 6),
        lambda x: x[:4, :12].reshape(4, 3, 4).transpose(0, 2),
        lambda x: x.flip(1),
        lambda x: x[0],
    ],
)
@pytest.mark.parametrize("n", [37, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(backend, device, view, dtype, n):
    x = view(torch.randn(6, n, generator=torch.Generator().manual_seed(0)).to(device, dtype))
    before = x.clone()
    leaf, contiguous = x.detach().requires_grad_(), x.contiguous().clone().requires_grad_()
    v = torch.randn(*x.shape[:-1], 2 * x.shape[-1], device=device).to(dtype)[..., ::2]
    p = soft_topk(leaf, 0.4, 0.2, backend=backend)
    want = soft_topk(contiguous, 0.4, 0.2, backend=backend)
    assert torch.equal(p, want) and torch.equal(x, before)
    (got_grad,) = torch.autograd.grad(p, leaf, v)
    (want_grad,) = torch.autograd.grad(want, contiguous, v.contiguous())
    assert torch.equal(got_grad, want_grad)


def test_expanded_gradient(backend, device):
    """p.sum().backward() hands an expanded v of stride 0: grad_x is 0, grad_k is 1."""
    x = torch.randn(5, 70, device=device, requires_grad=True)
    k = torch.full((5,), 3.5, device=device, requires_grad=True)
    soft_topk(x, k, backend=backend).sum().backward()
    assert (x.grad.abs() < 1e-6).all()
    torch.testing.assert_close(k.grad, torch.ones_like(k), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results_and_gradients(backend, device, dtype):
    x = torch.randn(2, 30, device=device).to(dtype).requires_grad_()
    k = torch.tensor([3.0, 4.0], device=device, dtype=torch.bfloat16, requires_grad=True)
    alpha = torch.tensor(0.1, device=device, dtype=torch.float64, requires_grad=True)
    p = soft_topk(x, k, alpha, backend=backend)
    (p * torch.randn_like(p)).sum().backward()
    assert p.dtype == x.grad.dtype == dtype
    assert k.grad.dtype == torch.bfloat16 and alpha.grad.dtype == torch.float64 and alpha.grad != 0


def test_k_is_not_rounded_to_the_dtype_of_x(backend, device):
    x = torch.randn(1, 4096, device=device).bfloat16()
    k = torch.tensor([301.0], device=device)  # bfloat16 has 300 and 302
    p = soft_topk(x.double(), k, 1e-3, backend=backend)
    assert p.sum().item() == pytest.approx(301, abs=1e-9)
    _, solution = softtopk.dispatch.module(backend).soft_topk_forward(x, k, 1e-3, True)
    count = (x.double() >= solution[0, 0].double()).sum()
    assert solution[0, 4] == count - 301


@pytest.mark.parametrize(
    "k", [torch.tensor(3), torch.tensor([2, 5, 3]), torch.tensor([2, 5, 3], dtype=torch.uint8)]
)
def test_integer_k_tensor_gets_no_gradient(backend, device, k):
    x = torch.randn(3, 20, device=device, requires_grad=True)
    p = soft_topk(x, k.to(device), backend=backend)
    torch.testing.assert_close(p.sum(1), k.float().expand(3).to(device))
    p.pow(2).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("k", [0, 0.4, 1, 7.5, 12, 19.9, 20])
@pytest.mark.parametrize("alpha", [3.0, 0.1, 1e-4])
@pytest.mark.parametrize("largest", [True, False])
def test_threshold_is_the_root(backend, device, k, alpha, largest):
    x = double(3, 20, seed=4).to(device)
    p, b = soft_topk(x, k, alpha, largest=largest, return_threshold=True, backend=backend)
    assert b.shape == (3,) and b.dtype == torch.float64 and not b.requires_grad
    t = (x - b.unsqueeze(1)) / alpha * (1 if largest else -1)
    cdf = torch.where(t <= 0, 0.5 * t.clamp(max=0).exp(), 1 - 0.5 * (-t).clamp(max=0).exp())
    torch.testing.assert_close(cdf, p, atol=1e-10, rtol=0)
    if 0 < k < 20:
        assert b.isfinite().all()


def test_backend_choice(monkeypatch):
    x = torch.randn(2, 9)
    monkeypatch.setenv("SOFTTOPK_BACKEND", "reference")
    assert softtopk.dispatch.choose(None, x.device) == "reference"
    monkeypatch.setenv("SOFTTOPK_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="SOFTTOPK_BACKEND='nonsense'"):
        soft_topk(x, 1)
    assert soft_topk(x, 1, backend="reference").shape == x.shape


def test_arguments_are_not_modified(backend, device):
    x, k, alpha = (
        torch.randn(3, 40, device=device),
        torch.tensor([-1.0, 3.0, 99.0], device=device),
        torch.rand(3, device=device),
    )
    copies = [t.clone() for t in (x, k, alpha)]
    leaves = [t.requires_grad_() for t in (x, k, alpha)]
    soft_topk(*leaves, backend=backend).pow(2).sum().backward()
    assert all(torch.equal(t.detach(), c) for t, c in zip(leaves, copies, strict=True))


@pytest.mark.parametrize("module", [functional, modules, dispatch], ids=lambda m: m.__name__)
def test_examples_of_the_docstrings(module):
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert tried > 0 and failed == 0
