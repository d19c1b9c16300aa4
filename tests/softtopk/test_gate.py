"""softtopk.gate against a * p in torch."""

from __future__ import annotations

import pytest
import torch

from softtopk import gate
from softtopk.functional import FLOATS
from softtopk.gate import gated

CUT = 2.0**-10


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def problem(shape, device, dtype):
    """a, p and a gradient; some p are 0, the cut itself, and between."""
    generator = torch.Generator().manual_seed(3)
    a, p, g = (torch.rand(shape, generator=generator) for _ in range(3))
    p[torch.rand(shape, generator=generator) < 0.3] *= 2 * CUT
    p[torch.rand(shape, generator=generator) < 0.1] = CUT
    p[torch.rand(shape, generator=generator) < 0.1] = 0
    tensors = [t.to(device, dtype) for t in (a, p, g - 0.5)]
    return [t.requires_grad_() for t in tensors[:2]] + tensors[2:]


# Less than a vector of 16 bytes, an odd rest, whole vectors of many blocks.
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (700, 33), (64, 1024)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_the_product(device, shape, dtype):
    a, p, g = problem(shape, device, dtype)
    gates = torch.where(p > CUT, p, 0).detach()
    out = gated(a, p + 0, CUT)
    assert out.dtype == dtype and torch.equal(out, a * gates)
    got = torch.autograd.grad(out, (a, p), g)
    assert torch.equal(got[0], g * gates) and torch.equal(got[1], g * a)


@pytest.mark.parametrize("shape", [(3, 37), (64, 1024)], ids=str)
def test_through_a_relu(device, shape):
    z, p, g = problem(shape, device, torch.float32)
    with torch.no_grad():
        z -= 0.5
    a = z + 0
    with torch.no_grad():
        a.relu_()
    out = gated(a, p.detach() + 0, CUT, rectified=True)
    (got,) = torch.autograd.grad(out, z, g)
    expected = torch.relu(z) * torch.where(p > CUT, p, 0).detach()
    assert torch.equal(out, expected)
    assert torch.equal(got, torch.autograd.grad(expected, z, g)[0])


def test_not_a_number_stays(device):
    a = torch.ones(2, 8, device=device)
    p = torch.full((2, 8), 0.5, device=device)
    p[1, 3] = float("nan")
    out = gated(a, p, CUT)
    assert out[1, 3].isnan() and out.isnan().sum() == 1


def test_strides_and_empty(device):
    a, p, g = problem((20, 31), device, torch.float32)
    out = gated(a.T, p.T + 0, CUT)
    assert torch.equal(out, a.T * torch.where(p > CUT, p, 0).T)
    (got,) = torch.autograd.grad(gated(a, p + 0, CUT), p, g.T.contiguous().T)
    assert torch.equal(got, g * a)
    assert gated(a[:0], p[:0] + 0, CUT).shape == (0, 31)


@pytest.mark.gpu
def test_the_kernel_is_used():
    a, p, _ = problem((4, 8), "cuda", torch.bfloat16)
    assert gate.fits(a, p)
