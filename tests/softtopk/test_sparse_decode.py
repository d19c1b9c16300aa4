"""sparse_decode, and the weight gradients that come from one transposition of a code."""

from __future__ import annotations

import pytest
import torch
from torch import nan

from softtopk import SparseCode, dispatch, soft_topk_code, soft_topk_decode, sparse_decode
from tests.conftest import skip_if_slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_code(rows, n, active, device, dtype=torch.float32, seed=0, skewed=False, backend=None, room=None):
    """A code of 0 to `active` random latents a row, or of skewed ones: 0 and 1 in every row, then a Zipf
    distribution; and its dense tensor."""
    g = torch.Generator().manual_seed(seed)
    chance = 1 / torch.arange(1, n + 1).float() if skewed else torch.ones(n)
    # The order of the latents by exponential waiting times is a draw without replacement.
    order = (torch.rand(rows, n, generator=g).log() / chance).topk(min(active, n)).indices
    drawn = torch.arange(order.shape[1]) < torch.randint(0, active + 1, (rows, 1), generator=g)
    x = torch.zeros(rows, n, dtype=dtype).scatter(1, order, drawn.to(dtype))
    if skewed:
        x[:, :2] = 1
    x = (x * torch.randn(rows, n, generator=g, dtype=dtype)).to(device)
    return SparseCode.from_dense(x, room, backend=backend), x


def weights(n, d, dtype, device, seed=1):
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(n, d, generator=g), torch.randn(d, generator=g)
    return weight.to(dtype).to(device), bias.to(dtype).to(device)


def tolerance(dtype):
    return {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[
        dtype
    ]


def assert_near(got, want, scale, dtype):
    """|got - want| <= tolerance * scale, elementwise, in float64."""
    error = (got.detach().double() - want.detach().double()).abs()
    assert (error <= tolerance(dtype) * scale.detach().double() + 1e-30).all(), (error / scale).max()


# ---- forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,n,d,active", [(1, 1, 1, 1), (5, 40, 7, 6), (9, 33, 64, 33), (4, 300, 130, 40)])
@pytest.mark.parametrize("biased", [False, True])
def test_forward(backend, device, dtype, rows, n, d, active, biased):
    T = torch.float64 if dtype == torch.float64 else torch.float32
    code, x = random_code(rows, n, active, device, T, backend=backend)
    weight, bias = weights(n, d, dtype, device)
    out = sparse_decode(code, weight, bias if biased else None, backend=backend)
    assert out.dtype == dtype and out.shape == (rows, d)
    want, scale = x.double() @ weight.double(), x.double().abs() @ weight.double().abs()
    if biased:
        want, scale = want + bias.double(), scale + bias.double().abs()
    assert_near(out, want, scale, dtype)


@pytest.mark.parametrize("n,d", [(24576, 768), (5000, 1000)])
def test_large(backend, device, n, d):
    skip_if_slow(backend, device, False)
    code, x = random_code(20, n, 70, device, skewed=True, backend=backend)
    weight, bias = weights(n, d, torch.float32, device)
    out = sparse_decode(code, weight, bias, backend=backend)
    want = x.double() @ weight.double() + bias.double()
    assert_near(out, want, x.double().abs() @ weight.double().abs() + 1, torch.float32)
    assert torch.equal(out, sparse_decode(code, weight, bias, backend=backend))


def test_rows_without_entries_and_empty_batches(backend, device):
    weight, bias = weights(9, 5, torch.float32, device)
    weight[:] = nan  # read by no row
    code = SparseCode.from_dense(torch.zeros(3, 9, device=device), backend=backend)
    assert torch.equal(sparse_decode(code, weight, bias, backend=backend), bias.expand(3, 5))
    assert (sparse_decode(code, weight, backend=backend) == 0).all()
    none = SparseCode.from_dense(torch.zeros(0, 9, device=device), backend=backend)
    leaf = weight.clone().requires_grad_()
    out = sparse_decode(none, leaf, backend=backend)
    assert out.shape == (0, 5)
    out.sum().backward()
    assert (leaf.grad == 0).all()


def test_unused_places_are_not_read(backend, device):
    code, x = random_code(4, 20, 5, device, room=40, backend=backend)
    weight, _ = weights(20, 6, torch.float32, device)
    weight[0] = weight[-1] = nan
    x[:, [0, -1]] = 0
    code = SparseCode.from_dense(x, 40, backend=backend)
    out = sparse_decode(code, weight, backend=backend)
    torch.testing.assert_close(out, x @ weight.nan_to_num(0))


def test_a_bad_row_spoils_no_other(backend, device):
    pre = torch.rand(3, 20, device=device)
    pre[1, 4] = nan
    weight, _ = weights(20, 6, torch.float32, device)
    out, code = soft_topk_decode(pre, 3, 0.1, weight, backend=backend)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all() and code.counts[1] == 1


def test_leading_dimensions_and_one_call(backend, device):
    pre = torch.randn(2, 3, 30, device=device)
    weight, bias = weights(30, 8, torch.float32, device)
    inner = torch.randn(30, device=device)
    options = {"bias": inner, "threshold": 0.1, "hard": True, "max_active": 32, "backend": backend}
    code = soft_topk_code(pre, 4, 0.05, **options)
    want = sparse_decode(code, weight, bias, backend=backend)
    got, same = soft_topk_decode(pre, 4, 0.05, weight, bias, **options)
    assert got.shape == (2, 3, 8) and torch.equal(got, want)
    assert torch.equal(same.to_dense(), code.to_dense())
    assert sparse_decode(soft_topk_code(pre[0, 0], 4, backend=backend), weight).shape == (8,)


# ---- gradients of weight, values and bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,n,d,active,skewed",
    [(1, 1, 1, 1, False), (6, 30, 9, 8, False), (40, 20, 24, 12, True), (300, 7, 16, 3, True)],
)
def test_gradients(backend, device, dtype, rows, n, d, active, skewed):
    """The last case: latents with more entries than one chunk holds."""
    skip_if_slow(backend, device, rows <= 40)
    T = torch.float64 if dtype == torch.float64 else torch.float32
    code, x = random_code(rows, n, active, device, T, skewed=skewed, backend=backend)
    weight, bias = weights(n, d, dtype, device)
    g = torch.randn(rows, d, generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    code = code.with_values(code.values.detach().requires_grad_())
    leaves = [code.values, weight.requires_grad_(), bias.requires_grad_()]
    got = torch.autograd.grad(sparse_decode(code, weight, bias, backend=backend), leaves, g)
    assert [t.dtype for t in got] == [T, dtype, dtype]

    f, W, G = x.double(), weight.double(), g.double()
    slack = 10 if skewed else 1  # sums of hundreds of terms
    assert_near(got[1], f.t() @ G, slack * (f.abs().t() @ G.abs()), dtype)
    assert_near(got[2], G.sum(0), slack * G.abs().sum(0), dtype)
    places = code.indices.long().clamp(max=n - 1)
    used = code.indices < n
    dots, scale = (t.gather(1, places) * used for t in (G @ W.t(), G.abs() @ W.abs().t()))
    assert_near(got[0], dots, scale + 1e-30, T)
    assert (got[0][~used] == 0).all()


@pytest.mark.parametrize("n,d", [(24576, 64), (3000, 520)])
def test_hot_latents(backend, device, n, d):
    """Latents of a heavy-tailed distribution, two of them in every row; bit-equal from run to run."""
    skip_if_slow(backend, device, False)
    code, x = random_code(600, n, 50, device, skewed=True, backend=backend)
    g = torch.randn(600, d, generator=torch.Generator().manual_seed(3)).to(device)
    weight, _ = weights(n, d, torch.float32, device)
    code = code.with_values(code.values.detach().requires_grad_())
    leaves = [code.values, weight.requires_grad_()]
    runs = []
    for _ in range(2):
        fresh = SparseCode.from_dense(x, backend=backend).with_values(code.values)
        runs.append(torch.autograd.grad(sparse_decode(fresh, weight, backend=backend), leaves, g))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    want = x.double().t() @ g.double()
    assert_near(runs[0][1], want, x.double().abs().t() @ g.double().abs(), torch.float32)
    assert (runs[0][1][(x != 0).sum(0) == 0] == 0).all()


@pytest.mark.parametrize("needed", ["values", "weight", "bias", "values weight", "weight bias"])
def test_only_what_is_asked_for(backend, device, needed):
    code, x = random_code(4, 20, 5, device, backend=backend)
    weight, bias = weights(20, 6, torch.float32, device)
    tensors = {"values": code.values.detach().clone(), "weight": weight, "bias": bias}
    leaves = [tensors[name].requires_grad_() for name in needed.split()]
    g = torch.randn(4, 6, device=device)
    out = sparse_decode(code.with_values(tensors["values"]), weight, bias, backend=backend)
    got = dict(zip(needed.split(), torch.autograd.grad(out, leaves, g), strict=True))
    dots = (g @ weight.t()).gather(1, code.indices.long().clamp(max=19)) * (code.indices < 20)
    want = {"values": dots, "weight": x.t() @ g, "bias": g.sum(0)}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name])


def test_two_decodes_of_one_code_share_its_transposition(backend, device, monkeypatch):
    kernels = dispatch.sparse_kernels(backend, torch.device(device))
    calls = []
    transpose = kernels.transpose
    monkeypatch.setattr(kernels, "transpose", lambda *a: calls.append(1) or transpose(*a))
    pre = torch.randn(5, 30, device=device, requires_grad=True)
    weight, bias = weights(30, 8, torch.float32, device)
    weight.requires_grad_()
    code = soft_topk_code(pre, 4, 0.05, backend=backend)
    (
        sparse_decode(code, weight, bias, backend=backend) + sparse_decode(code, weight, backend=backend)
    ).sum().backward()
    assert len(calls) == 1 and weight.grad.abs().sum() > 0
    code.transposed()
    assert len(calls) == 1


# ---- mixed precision, projection, squares, row-sparse gradients


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_copy_is_multiplied_with_and_the_weight_gets_the_gradient(backend, device, half):
    code, x = random_code(12, 30, 8, device, backend=backend)
    code = code.with_values(code.values.detach().requires_grad_())
    weight, bias = weights(30, 16, torch.float32, device)
    copy = weight.to(half)
    weight.requires_grad_(), bias.requires_grad_()
    g = torch.randn(12, 16, device=device).to(half)
    out = sparse_decode(code, weight, bias, copy=copy, backend=backend)
    assert out.dtype == half
    assert torch.equal(out, sparse_decode(code, copy, bias.to(half), backend=backend))
    to_values, to_weight, to_bias = torch.autograd.grad(out, [code.values, weight, bias], g)
    assert to_weight.dtype == to_bias.dtype == torch.float32 and copy.grad is None
    want = x.double().t() @ g.double()
    assert_near(
        to_weight, want, x.double().abs().t() @ g.double().abs(), torch.float32
    )  # not rounded to half
    assert_near(to_bias, g.double().sum(0), g.double().abs().sum(0), torch.float32)
    dots = (g.double() @ copy.double().t()).gather(1, code.indices.long().clamp(max=29)) * (code.indices < 30)
    torch.testing.assert_close(to_values.double(), dots, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("copied", [False, True])
def test_project_and_squares(backend, device, copied):
    code, x = random_code(12, 40, 6, device, backend=backend)
    weight, _ = weights(40, 16, torch.float32, device)
    weight = torch.nn.functional.normalize(weight, dim=1)
    copy = weight.bfloat16() if copied else None
    weight.requires_grad_()
    used = weight if copy is None else copy
    g = torch.randn(12, 16, device=device).to(used.dtype)
    squares = torch.full((40,), nan, device=device)
    for project in (False, True):
        out = sparse_decode(code, weight, copy=copy, project=project, squares=squares, backend=backend)
        (grad,) = torch.autograd.grad(out, weight, g)
        want = x.double().t() @ g.double()
        if project:
            want = want - (want * used.double()).sum(1, keepdim=True) * used.double()
        torch.testing.assert_close(grad.double(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(squares.double(), want.square().sum(1), atol=1e-5, rtol=1e-5)
    if not copied:
        assert (grad * weight).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("rows,d,copied", [(70, 13001, True), (70, 13000, False), (1100, 16384, True)])
def test_rows_longer_than_a_block_has_room_for(backend, device, rows, d, copied):
    """Of the last, y is also more than a cache keeps; some latents have more entries than a chunk."""
    skip_if_slow(backend, device, False)
    code, x = random_code(rows, 12, 6, device, skewed=True, backend=backend)
    code = code.with_values(code.values.detach().requires_grad_())
    weight = torch.nn.functional.normalize(weights(12, d, torch.float32, device)[0], dim=1)
    copy = weight.bfloat16() if copied else None
    used = weight if copy is None else copy
    weight.requires_grad_()
    g = torch.randn(rows, d, device=device).to(used.dtype)
    squares = torch.full((12,), nan, device=device)
    dots = (g.double() @ used.detach().double().t()).gather(1, code.indices.long().clamp(max=11))
    for project in (False, True):
        out = sparse_decode(code, weight, copy=copy, project=project, squares=squares, backend=backend)
        to_values, grad = torch.autograd.grad(out, [code.values, weight], g)
        want = x.double().t() @ g.double()
        scale = x.double().abs().t() @ g.double().abs()
        if project:
            want = want - (want * used.double()).sum(1, keepdim=True) * used.double()
        assert ((grad.double() - want).abs() <= 1e-5 * scale).all()
        torch.testing.assert_close(squares.double(), want.square().sum(1), atol=0, rtol=1e-5)
        torch.testing.assert_close(to_values.double(), dots * (code.indices < 12), atol=1e-4, rtol=1e-5)


def test_rows_of_silent_latents_are_not_written(backend, device):
    """torch.empty is NaN in tests."""
    code, x = random_code(6, 50, 4, device, backend=backend)
    weight, _ = weights(50, 8, torch.float32, device)
    weight.requires_grad_()
    g = torch.randn(6, 8, device=device)
    squares = torch.full((50,), nan, device=device)
    out = sparse_decode(code, weight, squares=squares, sparse_gradient=True, backend=backend)
    (grad,) = torch.autograd.grad(out, weight, g)
    silent = ~code.fired()
    assert 0 < silent.sum() < 50
    assert grad[silent].isnan().all()
    want = x.t() @ g
    torch.testing.assert_close(grad[~silent], want[~silent])
    torch.testing.assert_close(squares, want.square().sum(1))
