"""softtopk.activity against counting in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softtopk import SparseCode, hard_topk_code
from softtopk.activity import activity
from softtopk.functional import FLOATS
from tests.waiting import record

# (rows, n): no rows, less than a warp, odd, whole chunks, several batches of them, many rows of a warp.
SHAPES = [(0, 5), (1, 1), (3, 30), (70, 333), (65, 1024), (9, 4104), (3, 70_000), (20_000, 64)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def latents(shape, device, dtype=torch.float32) -> Tensor:
    """Most are 0, some -0, some too small to be normal; the last latents and rows stay silent."""
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator).to(dtype)
    x[torch.rand(shape, generator=generator) < 0.9] = 0.0
    x[:, ::3] *= -0.0
    x[:, 1::7] = torch.where(x[:, 1::7] != 0, torch.finfo(dtype).tiny / 4, 0).to(dtype)
    x[:, shape[1] - shape[1] // 4 :] = 0
    x[shape[0] - shape[0] // 4 :] = 0
    return x.to(device)


def assert_found(found, x: Tensor):
    nonzero = x != 0
    assert found.fired.dtype == torch.bool and torch.equal(found.fired, nonzero.any(0))
    assert found.active.shape == found.most.shape == ()
    assert found.active.dtype == found.entries.dtype == found.most.dtype == torch.int64
    assert found.active == nonzero.sum()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_latents(device, shape, dtype):
    x = latents(shape, device, dtype)
    found = activity(x)
    assert_found(found, x)
    assert found.entries == found.active
    assert found.most == (int((x != 0).sum(1).max()) if len(x) else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_of_a_code(device, shape, dtype):
    x = latents(shape, device, dtype)
    code = SparseCode.from_dense(x)
    found = activity(code)
    assert_found(found, x)
    assert found.entries == code.counts.sum() and found.most == code.counts.max()


def test_entries_of_value_0_and_rows_that_were_cut(device):
    pre = torch.tensor([[3.0, 2.0, 1.0, 0.5], [0.0, 0.0, 0.0, 1.0]], device=device)
    code = hard_topk_code(pre, torch.tensor([3.0, 1.0], device=device), max_active=2, check=False)
    code = code.with_values(code.values * torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device))
    found = activity(code)
    assert_found(found, code.to_dense())
    assert found.entries == 4 and found.most == 3 and found.active == 2


def test_what_the_kernels_do_not_take(device):
    x = latents((40, 333), device)
    assert_found(activity(x.T), x.T)
    x = latents((2, 400_000), device)
    assert_found(activity(x), x)
    x = latents((12, 40), device).flatten()[5:-35].view(11, 40)  # rows that do not start on 16 bytes
    assert_found(activity(x), x)


@pytest.mark.gpu
def test_in_a_graph_without_waiting():
    x = latents((300, 512), "cuda")
    code = SparseCode.from_dense(x)
    graph, found = record(lambda: (activity(x), activity(code)))
    x.copy_(x.flip(0, 1))
    code.values.mul_(code.values > 0)
    graph.replay()
    assert_found(found[0], x)
    assert_found(found[1], code.to_dense())
