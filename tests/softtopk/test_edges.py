"""Edge semantics, the same on every backend: masks, infinities, NaN, clamping, ties, limits of k."""

from __future__ import annotations

import pytest
import torch
from torch import inf, nan

from softtopk import dispatch, hard_topk, soft_topk


def gradients(x, k, alpha, v, backend, **options):
    """p and the gradients of <p, v> through the public function; k and alpha (rows,) float32."""
    x, k, alpha = (t.clone().requires_grad_() for t in (x, k, alpha))
    p = soft_topk(x, k, alpha, backend=backend, **options)
    return p.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(p, (x, k, alpha), v))


def rows(device, *values):
    return torch.tensor(values, dtype=torch.float32, device=device)


def test_masked_elements_do_not_count(backend, device):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    masked = torch.cat([x, torch.full((3, 9), -inf)], 1)[:, torch.randperm(49)].to(device)
    kept = masked.isfinite().cpu()
    k, alpha, v = rows(device, 1, 5.5, 38), rows(device, 0.3, 0.01, 1), torch.randn(3, 49).to(device)
    p, grad_x, grad_k, grad_alpha = gradients(masked, k, alpha, v, backend)
    assert (p[~kept] == 0).all() and (grad_x[~kept] == 0).all()
    dense = masked.cpu()[kept].reshape(3, 40).to(device)
    want = gradients(dense, k, alpha, v.cpu()[kept].reshape(3, 40).to(device), backend)
    torch.testing.assert_close(p[kept].reshape(3, 40), want[0])
    torch.testing.assert_close(grad_x[kept].reshape(3, 40), want[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_k, want[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_alpha, want[3], rtol=1e-4, atol=1e-4)


def test_plus_infinity_takes_one_unit(backend, device):
    x = rows(device, [1.0, inf, 2.0, 0.5, inf])
    v = torch.ones_like(x)
    p, grad_x, _, _ = gradients(x, rows(device, 3), rows(device, 0.1), v, backend)
    want, *_ = gradients(rows(device, [1.0, 2.0, 0.5]), rows(device, 1), rows(device, 0.1), v[:, :3], backend)
    assert p[0, 1] == 1 and p[0, 4] == 1
    torch.testing.assert_close(p[0, [0, 2, 3]], want[0])
    assert (grad_x[0, [1, 4]] == 0).all()


@pytest.mark.parametrize(
    "k,sum_p,grad_k", [(-3, 1, 0), (0.5, 1, 0), (1, 1, 2.5), (3, 3, 2.5), (3.5, 3, 0), (9, 3, 0)]
)
def test_k_is_clamped_to_what_can_be_chosen(backend, device, k, sum_p, grad_k):
    """[+inf, 2, 2, -inf]: 1 <= sum(p) <= 3; the gradient passes at equality and is 0 outside."""
    x = rows(device, [inf, 2.0, 2.0, -inf])
    v = rows(device, [7.0, 2.0, 3.0, 9.0])
    p, grad_x, got, grad_alpha = gradients(x, rows(device, k), rows(device, 0.1), v, backend)
    assert p.sum() == sum_p and p[0, 0] == 1 and p[0, 3] == 0
    assert got.item() == grad_k
    assert (grad_x == 0).all() and grad_alpha == 0


@pytest.mark.parametrize("k,sign", [(0, 1), (4, -1)])
def test_grad_k_at_the_ends_is_a_softmax(backend, device, k, sign):
    x, v = rows(device, [0.3, -0.2, 0.1, 0.25]), rows(device, [1.0, 2.0, -3.0, 0.5])
    p, grad_x, grad_k, grad_alpha = gradients(x, rows(device, k), rows(device, 0.2), v, backend)
    assert (p == k / 4).all() and (grad_x == 0).all() and grad_alpha == 0
    want = (torch.softmax(sign * x.cpu().double() / 0.2, 1) * v.cpu()).sum()
    assert grad_k.item() == pytest.approx(want.item(), abs=1e-5)


def test_no_finite_element(backend, device):
    x = rows(device, [inf, -inf, inf], [-inf, -inf, -inf], [inf, inf, inf])
    p, grad_x, grad_k, grad_alpha = gradients(
        x, rows(device, 2, 0, 3), rows(device, 1, 1, 1), torch.ones_like(x), backend
    )
    assert p.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 1]]
    assert not grad_x.any() and not grad_k.any() and not grad_alpha.any()


@pytest.mark.parametrize("what", ["x", "k", "alpha", "alpha=0", "alpha<0", "alpha=inf"])
@pytest.mark.parametrize("n", [5, 3000])
def test_a_bad_row_is_nan_and_the_others_are_untouched(backend, device, what, n):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0)).to(device)
    x[:, 2] = -inf
    k, alpha, v = rows(device, 2, 2, 2), rows(device, 0.1, 0.1, 0.1), torch.randn(3, n).to(device)
    want = gradients(x, k, alpha, v, backend)
    if what == "x":
        x[1, n - 2] = nan
    elif what == "k":
        k[1] = nan
    else:
        alpha[1] = {"alpha": nan, "alpha=0": 0.0, "alpha<0": -0.1, "alpha=inf": inf}[what]
    got = gradients(x, k, alpha, v, backend)
    for g, w in zip(got, want, strict=True):
        assert g[1].isnan().all()
        assert torch.equal(g[[0, 2]], w[[0, 2]])


def test_nan_in_v_does_not_spread_from_where_h_is_zero(backend, device):
    x = rows(device, [3.0, 2.9, 2.95, -1e3, -inf, inf])
    v = rows(device, [1.0, 2.0, 3.0, nan, inf, nan])
    p, grad_x, grad_k, grad_alpha = gradients(x, rows(device, 2), rows(device, 0.1), v, backend)
    assert grad_x.isfinite().all() and grad_k.isfinite().all() and grad_alpha.isfinite().all()
    assert (grad_x[0, 3:] == 0).all() and grad_k.item() != 0


@pytest.mark.parametrize("n", [1, 2, 7, 4096, 5000])
def test_equal_values_get_equal_weights(backend, device, n):
    x = torch.full((2, n), -0.7, device=device)
    p = soft_topk(x, rows(device, 0.3 * n, 1), 1e-3, backend=backend).cpu()
    assert (p == p[:, :1]).all()
    torch.testing.assert_close(p[:, 0], torch.tensor([0.3, 1 / n]))


def test_one_element_gets_k(backend, device):
    p, grad_x, grad_k, _ = gradients(
        rows(device, [5.0], [-1e30], [0.0]), rows(device, 0.25, 0.75, 1), rows(device, 1, 1e-4, 1),
        rows(device, [2.0], [3.0], [4.0]), backend,
    )  # fmt: skip
    assert p.flatten().tolist() == [0.25, 0.75, 1] and (grad_x == 0).all()
    assert grad_k.tolist() == [2, 3, 4]


def test_empty_batch(backend, device):
    x = torch.empty(0, 7, device=device, requires_grad=True)
    p = soft_topk(x, torch.empty(0, device=device), backend=backend)
    p.sum().backward()
    assert p.shape == (0, 7) and x.grad.shape == (0, 7)
    values, indices, counts = hard_topk(x.detach(), 3, return_indices=True, backend=backend)
    assert values.shape == indices.shape == (0, 3) and counts.shape == (0,)


def test_signed_zeros_are_equal(backend, device):
    x = rows(device, [0.0, -0.0, 0.0, -0.0])
    assert soft_topk(x, 1, backend=backend).tolist() == [[0.25] * 4]
    assert hard_topk(x, 2, backend=backend).tolist() == [[1, 1, 0, 0]]


def test_smallest_is_the_operator_on_minus_x(backend, device):
    x = torch.randn(4, 333, generator=torch.Generator().manual_seed(0)).to(device)
    k, alpha, v = (
        rows(device, 1, 7.5, 100, 332),
        rows(device, 0.1, 1, 1e-3, 1e-2),
        torch.randn(4, 333).to(device),
    )
    got = gradients(x, k, alpha, v, backend, largest=False)
    want = gradients(-x, k, alpha, v, backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], -want[1])
    assert torch.equal(got[2], want[2]) and torch.equal(got[3], want[3])


def test_position_in_the_batch_does_not_matter(backend, device):
    """Bit-equal results for the same row anywhere: also when the row's alignment differs (odd n)."""
    n = 1027
    row = torch.randn(1, n, generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.randn(9, n, generator=torch.Generator().manual_seed(1)).to(device)
    x[[0, 3, 8]] = row
    v = torch.randn(1, n, generator=torch.Generator().manual_seed(2)).to(device).expand(9, n)
    kernels = dispatch.module(backend)
    p, solution = kernels.soft_topk_forward(x, 20.5, 0.05, True)
    outputs = (p, solution, *kernels.soft_topk_backward(x, solution, 0.05, v, True))
    for t in outputs:
        assert torch.equal(t[0], t[3]) and torch.equal(t[0], t[8])
