"""softtopk.shift against its formula."""

from __future__ import annotations

import pytest
import torch

from softtopk import shift as module
from softtopk.shift import shifted


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def problem(shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    shift, scale = (torch.rand(shape[-1], generator=generator).to(device) + 0.1 for _ in range(2))
    return x, shift, scale


# One element, odd rows, more columns than a block has, several dimensions, none.
SHAPES = [(1, 1), (9, 7), (17, 128), (3, 1540), (5, 1301), (2, 3, 8), (8,), (0, 4), (3, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float16], ids=str)
def test_is_the_formula(device, shape, dtype, out):
    x, shift, scale = problem(shape, device, dtype)
    for by in (None, scale):
        expected = x - shift if by is None else (x - shift) / by
        got = shifted(x, shift, by, out)
        assert got.dtype == (out or torch.float32) and torch.equal(got, expected.to(got.dtype))


def test_gradients_and_other_layouts(device):
    x, shift, scale = problem((6, 8), device)
    x.requires_grad_()
    (got,) = torch.autograd.grad(shifted(x, shift, scale).sum(), x)
    torch.testing.assert_close(got, (1 / scale).expand(6, 8))
    x = x.detach()
    assert torch.equal(shifted(x[:, ::2], shift[::2]), x[:, ::2] - shift[::2])
    part = x.flatten()[1:-7].view(5, 8)  # rows that do not start on 16 bytes
    assert torch.equal(shifted(part, shift), part - shift)
    assert shifted(x.double(), shift).dtype == torch.float64


@pytest.mark.gpu
def test_the_kernel_is_used():
    assert module.fits(*problem((4, 8), "cuda", torch.bfloat16))
