"""Any rank and strides: results equal to those of a contiguous copy, in bounded extra memory."""

from __future__ import annotations

import math

import pytest
import torch

from softtopk import hard_topk, layout, soft_topk


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VIEWS = {
    "contiguous": lambda: rand(4, 3, 10),
    "transposed": lambda: rand(10, 3, 4).transpose(0, 2),
    "permuted": lambda: rand(3, 10, 4).permute(2, 0, 1),
    "every second": lambda: rand(4, 3, 20)[..., ::2],
    "rows apart": lambda: rand(4, 3, 30)[..., 5:15],
    "every second row": lambda: rand(4, 6, 10)[:, ::2],
    "expanded rows": lambda: rand(4, 1, 10).expand(4, 3, 10),
    "expanded elements": lambda: rand(4, 3, 1).expand(4, 3, 10),
    "one number": lambda: torch.tensor(0.3).expand(4, 3, 10),
    "channels last": lambda: rand(4, 3, 2, 5).to(memory_format=torch.channels_last)[:, :, 0],
    "windows": lambda: rand(60).as_strided((4, 3, 10), (12, 3, 1)),
    "no row": lambda: rand(0, 3, 10),
}


@pytest.mark.parametrize("slab", ["whole", "small"])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_views(monkeypatch, view, dim, slab):
    """`small` makes every part a few rows, as a part of a tensor of gigabytes is."""
    if slab == "small":
        monkeypatch.setattr(layout, "SLAB_BYTES", 96)
    x = VIEWS[view]()
    if x.shape[dim] == 0:
        pytest.skip("nothing to select from")
    k = torch.linspace(0.2, 0.9, math.prod(x.shape) // x.shape[dim]).reshape(x.sum(dim).shape) * x.shape[dim]
    v = rand(*x.shape[::-1], seed=1).permute(*reversed(range(x.dim())))
    before = x.clone()
    got_x, want_x = x.detach().requires_grad_(), x.contiguous().clone().requires_grad_()
    got_k, want_k = (k.clone().requires_grad_() for _ in range(2))
    got, b = soft_topk(got_x, got_k, dim=dim, return_threshold=True)
    want, want_b = soft_topk(want_x.movedim(dim, -1).contiguous(), want_k, return_threshold=True)
    assert torch.equal(got, want.movedim(-1, dim)) and torch.equal(b, want_b)
    if view in ("contiguous", "transposed", "permuted"):  # dense: the result lies as x does
        assert got.stride() == x.stride()
    got_grads = torch.autograd.grad(got, (got_x, got_k), v)
    want_grads = torch.autograd.grad(want, (want_x, want_k), v.movedim(dim, -1).contiguous())
    assert torch.equal(got_grads[0], want_grads[0]) and torch.equal(got_grads[1], want_grads[1])
    mask = hard_topk(x, k, dim=dim)
    assert torch.equal(mask, hard_topk(x.movedim(dim, -1).contiguous(), k).movedim(-1, dim))
    for g, w in zip(
        hard_topk(x, k, dim=dim, max_k=3, return_indices=True),
        hard_topk(x.contiguous(), k, dim=dim, max_k=3, return_indices=True),
        strict=True,
    ):
        assert torch.equal(g, w)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 1, 5), (2, 3, 4, 5), (1000, 2, 5), (2, 0, 5)])
@pytest.mark.parametrize("limit", [1, 20, 45, 100, 10_000])
def test_slabs_cover_every_row_once(monkeypatch, shape, limit):
    monkeypatch.setattr(layout, "SLAB_BYTES", limit)
    seen = torch.zeros(shape[:-1], dtype=torch.int)
    x = torch.empty(shape)
    for index in layout.slabs(x):
        seen[index] += 1
        part = x[index]
        assert part.numel() * 4 <= max(limit, 4 * shape[-1])
    assert (seen == 1).all()


def test_a_copy_is_made_only_where_it_must(monkeypatch):
    """Row-strided and expanded views go to the kernels as they lie."""
    monkeypatch.setattr(layout, "slab_by_slab", None)
    for x in (rand(6, 40), rand(6, 40)[:, 3:9], rand(6, 40)[::2], rand(1, 40).expand(6, 40), rand(2, 3, 8)):
        soft_topk(x, 2, backend="reference")
    with pytest.raises(TypeError):
        soft_topk(rand(6, 4).t(), 2)
