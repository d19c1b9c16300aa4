"""softtopk.squared_error against its formula in double precision."""

from __future__ import annotations

import pytest
import torch

from softtopk import squared_error as module
from softtopk.squared_error import squared_error


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def problem(shape, device, dtype):
    generator = torch.Generator().manual_seed(shape[0])
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    return x.to(device), y.to(device, dtype).requires_grad_()


# Less than a vector, an odd rest, a whole block, several and a rest.
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 256), (5, 1640), (129, 333)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_formula(device, shape, dtype):
    x, y = problem(shape, device, dtype)
    loss = squared_error(x, y)
    wide = y.detach().double().requires_grad_()
    expected = (wide - x.double()).pow(2).sum(1).mean()
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (got,) = torch.autograd.grad(3 * loss, y)
    (wanted,) = torch.autograd.grad(3 * expected, wide)
    assert got.dtype == dtype
    exact = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=2 * exact, atol=1e-7)


def test_what_the_kernels_do_not_take(device):
    x, y = problem((12, 9), device, torch.float32)
    for a, b in [(x.T, y.T), (x.flatten()[1:-7].view(20, 5), y.flatten()[1:-7].view(20, 5)), (x.double(), y)]:
        expected = (b.double() - a.double()).pow(2).sum(1).mean()
        torch.testing.assert_close(squared_error(a, b).double(), expected)
    x.requires_grad_()
    to_x, to_y = torch.autograd.grad(squared_error(x, y), (x, y))
    torch.testing.assert_close(to_x, -to_y)


@pytest.mark.gpu
def test_the_kernel_is_used_and_repeats_itself():
    x, y = problem((777, 500), "cuda", torch.bfloat16)
    assert module.fits(x, y)
    one, other = squared_error(x, y), squared_error(x, y)
    assert torch.equal(one, other)
