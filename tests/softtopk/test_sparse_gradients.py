"""Gradients of sparse codes: of the selection, through encoders and decoders, over a training run."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nan
from torch.autograd import gradcheck
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from softtopk import (
    encode_hard_topk,
    encode_soft_topk,
    hard_topk_code,
    soft_topk_code,
    soft_topk_decode,
    sparse_decode,
)
from tests.accuracy import alpha_weight, difference, oracle
from tests.cases import BAR_FAMILIES, gapped, make
from tests.softtopk.test_sparse_code import skip_if_slow
from tests.sparse_oracle import dense, dense_hard, places


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def dense_gradients(pre, k, alpha, g, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Those of <f, g> to pre, k and alpha by autograd of the composite, in float64 on the CPU."""
    at = leaves(*(t.double().cpu() for t in (pre, k, alpha)))
    return torch.autograd.grad(dense(*at, **options), at, g.double().cpu())


def problem(rows: int, n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """float64 pre, k, alpha and g (rows, n), with more and less than k positive elements."""
    draw = torch.Generator().manual_seed(seed)
    pre = torch.randn(rows, n, generator=draw, dtype=torch.float64)
    k = 0.5 + 0.7 * n * torch.rand(rows, generator=draw, dtype=torch.float64)
    alpha = 10 ** (-1.5 * torch.rand(rows, generator=draw, dtype=torch.float64))
    return pre, k, alpha, torch.randn(rows, n, generator=draw, dtype=torch.float64)


# ---- of the selection


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.0, 0.3, -2.0])
def test_equal_to_the_dense_composite(backend, device, hard, scale):
    """In float64, with the gradient that comes through the selection scaled."""
    pre, k, alpha, g = problem(12, 40)
    options = {"hard": hard, "selection_gradient": scale}
    want = dense_gradients(pre, k, alpha, g, **options)
    at = leaves(*(t.to(device) for t in (pre, k, alpha)))
    code = soft_topk_code(*at, backend=backend, **options)
    got = torch.autograd.grad(code.to_dense(), at, g.to(device))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-11, rtol=1e-10)


@functools.cache
def bar_case(family: str, alpha: float, hard: bool, n: int = 700):
    k = torch.tensor([0.5, 1, 8, 8.5, n / 3, 0.75 * n, n - 0.5])
    pre = make(family, len(k), n, seed=n)
    g = torch.randn(pre.shape, generator=torch.Generator().manual_seed(7))
    scale = torch.full((len(k),), alpha, dtype=torch.float64)
    with_selection = dense_gradients(pre, k, scale, g, hard=hard)
    without = dense_gradients(pre, k, scale, g, hard=hard, selection_gradient=0.0)
    return pre, k, g, with_selection, without[0]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", BAR_FAMILIES)
def test_float32_at_the_bars(backend, device, family, alpha, hard):
    """The bars of the dense operator: 1e-6 in p, 1e-5 of the largest gradient, 1e-4 of grad_alpha's scale."""
    skip_if_slow(backend, device, alpha == 1e-2 and not hard)
    pre, k, g, want, direct = bar_case(family, alpha, hard)
    scale = torch.full((len(k),), alpha, device=device)
    at = leaves(pre.to(device), k.to(device), scale)
    code = soft_topk_code(*at, hard=hard, backend=backend)
    got = [t.double().cpu() for t in torch.autograd.grad(code.to_dense(), at, g.to(device))]
    a, g = pre.double().relu(), g.double()
    v = a * g
    v_max = v.abs().amax(1)
    through = (want[0] - direct).abs().amax(1, keepdim=True)
    bar = 1e-5 * through + 1e-6 * g.abs() + 2.0**-23 * g.abs()
    assert (difference(got[0], want[0]) <= bar).all()
    assert (difference(got[1], want[1]) <= 1e-5 * v_max).all()
    exact = oracle(a, k, scale, v)
    weight = alpha_weight(exact, scale.double().cpu(), v)
    floor = 1e-30 * v_max / alpha
    assert (difference(got[2], want[2]) <= torch.where(weight > floor, 1e-4 * weight, torch.inf)).all()


@pytest.mark.parametrize("gap", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_k_in_a_gap(backend, device, dtype, gap, hard):
    """Half of q lies below the gap, where p is 0: dropped by p alone, grad_k would be off by that half."""
    alpha = 1e-6
    x = (gapped(gap, alpha, above=5, n=30, seed=2) + 2 + gap * alpha).to(dtype)
    k = torch.tensor([5.0], dtype=torch.float64)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, want, _ = dense_gradients(x, k, torch.tensor([alpha], dtype=torch.float64), g, hard=hard)
    at = leaves(x.to(device), k.to(device))
    code = soft_topk_code(*at, alpha, hard=hard, backend=backend)
    got = torch.autograd.grad(code.to_dense(), at[1], g.to(device, dtype), retain_graph=True)[0]
    v_max = (x.double() * g).abs().max()
    bar = 1e-5 if dtype == torch.float32 else 1e-9
    assert (got.cpu() - want).abs() <= bar * v_max
    if gap >= 1e3:  # what a rule by p would have left of q
        active = places(code, x.to(device))
        above = torch.where(active > 2 + gap * alpha, 1 / active, 0)
        (share,) = torch.autograd.grad(code.values, at[1], above)
        assert 0.49 < share < 0.51


def test_checked_by_differences(backend, device):
    pre = torch.tensor([[0.9, -0.4, 1.3, 0.35, 0.6, -1.0], [0.2, 0.5, 1.1, -0.1, 0.75, 1.6]])
    k, alpha = torch.tensor([2.3, 3.6]), torch.tensor([0.3, 0.4])
    bias = torch.tensor([0.02, 0.01, -0.03, 0.05, 0.04, -0.01])
    weight, out = torch.randn(6, 3), torch.randn(3)
    at = leaves(*(t.to(device, torch.float64) for t in (pre, k, alpha, bias, weight, out)))

    def composite(pre, k, alpha, bias, weight, out):
        x_hat, code = soft_topk_decode(pre, k, alpha, weight, out, bias=bias, threshold=0.05, backend=backend)
        return x_hat, code.values

    quick = backend == "triton"
    assert gradcheck(composite, at, eps=1e-6, atol=1e-5, fast_mode=quick, nondet_tol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bias_and_dtypes(backend, device, dtype):
    draw = torch.Generator().manual_seed(4)
    pre = torch.randn(5, 60, generator=draw).to(dtype)
    bias = torch.randn(60, generator=draw)
    g = torch.randn(5, 60, generator=draw)
    k = torch.tensor([4.0, 5.5, 9, 12, 30], dtype=torch.bfloat16)
    at = leaves(*(t.to(device) for t in (pre, bias, k, torch.tensor(0.05))))
    code = soft_topk_code(at[0], at[2], at[3], bias=at[1], backend=backend)
    got = torch.autograd.grad(code.to_dense(), at, g.to(device))
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.bfloat16, torch.float32]
    z = (pre + bias.to(dtype)).double()
    want = dense_gradients(z, k, torch.full((5,), 0.05, dtype=torch.float64), g)
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    size = want[0].abs().max()
    assert (got[0].double().cpu() - want[0]).abs().max() <= ulp * size
    assert (got[1].double().cpu() - want[0].sum(0)).abs().max() <= 5 * ulp * size
    assert (got[2].double().cpu() - want[1]).abs().max() <= 2.0**-8 * want[1].abs().max()
    assert (got[3].double().cpu() - want[2].sum()).abs() <= 1e-4 * want[2].abs().sum()
    # Only the bias
    only = soft_topk_code(pre.to(device), k.to(device), 0.05, bias=at[1], backend=backend)
    torch.testing.assert_close(torch.autograd.grad(only.to_dense(), at[1], g.to(device))[0], got[1])


def test_hard_codes(backend, device):
    pre, k, _, g = problem(6, 40, seed=3)
    x = pre.clone().requires_grad_()
    bias = torch.randn(
        40, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    want = torch.autograd.grad(dense_hard(x, k, bias, 0.1), [x, bias], g)
    at = leaves(pre.to(device), bias.to(device))
    code = hard_topk_code(at[0], k.to(device), bias=at[1], threshold=0.1, backend=backend)
    got = torch.autograd.grad(code.to_dense(), at, g.to(device))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-14, rtol=0)


def test_bad_rows_and_clamped_budgets(backend, device):
    pre = torch.rand(5, 30, generator=torch.Generator().manual_seed(0)) + 0.01
    pre[1, 8] = nan
    pre[2, 3] = torch.inf
    k = torch.tensor([4.0, 4.0, 4.0, 50.0, -1.0])
    at = leaves(pre.to(device), k.to(device), torch.full((5,), 0.05, device=device))
    code = soft_topk_code(*at, backend=backend)
    g = torch.ones(5, 30, device=device)
    to_pre, to_k, to_alpha = torch.autograd.grad(code.to_dense(), at, g)
    assert to_pre[1].isnan().any() and to_k[1].isnan() and to_alpha[1].isnan()
    good = torch.tensor([0, 3, 4])
    want = dense_gradients(pre[good], k[good], torch.full((3,), 0.05), torch.ones(3, 30))
    rest = good.to(device)
    assert (to_pre[rest].double().cpu() - want[0]).abs().max() <= 1e-5 * want[0].abs().max()
    torch.testing.assert_close(to_k[rest].double().cpu(), want[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(to_alpha[rest].double().cpu(), want[2], atol=1e-3, rtol=1e-4)
    assert to_k[3] == to_k[4] == 0 and to_pre[2].isfinite().all() and to_k[2].isfinite()


def test_values_of_unused_places_have_no_gradient(backend, device):
    pre = torch.rand(3, 20, device=device)
    for function in (soft_topk_code, hard_topk_code):
        x = pre.clone().requires_grad_()
        code = function(x, 3, backend=backend)
        code.values.backward(torch.where(code.indices < 20, 1.0, nan))
        assert x.grad.isfinite().all() and (x.grad != 0).any()


# ---- through encoder and decoder


def autoencoder(rows=8, d=6, n=24, seed=0, device="cpu", dtype=torch.float64):
    """x, encoder weight and bias, decoder weight and bias, k, alpha; all float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rows, d), (n, d), (n,), (n, d), (d,)]
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    k = 1 + 6 * torch.rand(rows, generator=draw, dtype=torch.float64)
    return [t.to(device, dtype) for t in tensors] + [k.to(device), torch.tensor(0.2, device=device).double()]


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_encode_equals_linear_and_the_composite(backend, device, mode):
    at = leaves(*autoencoder())
    x, encoder, bias, decoder, out, k, alpha = at
    pre = linear(x, encoder, bias)
    if mode == "hard":
        f, at = dense_hard(pre, k.detach()), at[:5]
    else:
        f = dense(pre, k, alpha, threshold=0.1, hard=mode == "straight_through")
    g = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad(f @ decoder + out, at, g)

    here = leaves(*(t.to(device) for t in autoencoder()))
    x, encoder, bias, decoder, out, k, alpha = here
    if mode == "hard":
        code, here = encode_hard_topk(x, encoder, bias, k.detach(), backend=backend), here[:5]
    else:
        hard = mode == "straight_through"
        code = encode_soft_topk(x, encoder, bias, k, alpha, threshold=0.1, hard=hard, backend=backend)
    assert code.shape == (8, 24)
    got = torch.autograd.grad(sparse_decode(code, decoder, out, backend=backend), here, g.to(device))
    torch.testing.assert_close(code.to_dense().cpu(), f, atol=1e-12, rtol=1e-12)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (5,), (6,), (1, 2), (0, 5)])
def test_encode_gives_what_is_asked_for(backend, device, needed):
    everything = leaves(*autoencoder(device=device))
    x, encoder, bias, _, _, k, alpha = everything
    g = torch.randn(8, 64, dtype=torch.float64, device=device)
    at = [everything[i] for i in (0, 1, 2, 5, 6)]
    want = torch.autograd.grad(
        encode_soft_topk(x, encoder, bias, k, alpha, max_active=64, backend=backend).values, at, g
    )
    want = dict(zip((0, 1, 2, 5, 6), want, strict=True))
    tensors = [t.detach().requires_grad_(i in needed) for i, t in enumerate(everything)]
    x, encoder, bias, _, _, k, alpha = tensors
    code = encode_soft_topk(x, encoder, bias, k, alpha, max_active=64, backend=backend)
    got = torch.autograd.grad(code.values, [tensors[i] for i in needed], g)
    for i, gradient in zip(needed, got, strict=True):
        assert torch.equal(gradient, want[i])


def test_encode_in_mixed_precision(backend, device):
    x, encoder, bias, decoder, out, k, alpha = autoencoder(
        rows=40, d=16, n=60, device=device, dtype=torch.float32
    )
    x, copies = x.bfloat16(), [encoder.bfloat16(), decoder.bfloat16()]
    at = leaves(encoder, bias, decoder, out)
    squares = [torch.full((60,), nan, device=device) for _ in range(2)]
    code = encode_soft_topk(x, at[0], at[1], k, alpha, copy=copies[0], squares=squares[0], backend=backend)
    x_hat = sparse_decode(code, at[2], at[3], copy=copies[1], squares=squares[1], backend=backend)
    assert x_hat.dtype == torch.bfloat16 and code.values.dtype == torch.float32
    g = torch.randn(40, 16, device=device).bfloat16()
    got = torch.autograd.grad(x_hat, at, g)
    assert all(t.dtype == torch.float32 for t in got)
    # The same in float64 from the bfloat16 pre-activations.
    pre = linear(x, copies[0], bias.bfloat16()).double().cpu().requires_grad_()
    f = dense(pre, k.cpu(), alpha.cpu().expand(40))
    (to_pre,) = torch.autograd.grad(f, pre, (g.double() @ copies[1].double().t()).cpu())
    want = [to_pre.t() @ x.double().cpu(), to_pre.sum(0), f.t() @ g.double().cpu(), g.double().sum(0).cpu()]
    for a, b in zip(got, want, strict=True):
        assert (a.double().cpu() - b).abs().max() <= 2e-5 * b.abs().max()
    for filled, gradient in zip(squares, (got[0], got[2]), strict=True):
        torch.testing.assert_close(filled, gradient.square().sum(1), rtol=1e-5, atol=1e-6)


def test_encode_leaves_rows_of_silent_latents(backend, device):
    x, encoder, bias, *_ = autoencoder(rows=3, n=80, device=device, dtype=torch.float32)
    encoder.requires_grad_(), bias.requires_grad_()
    results = []
    for sparse in (False, True):
        code = encode_soft_topk(x, encoder, bias, 4, 0.01, sparse_gradient=sparse, backend=backend)
        results.append(torch.autograd.grad(code.values, [encoder, bias], torch.ones_like(code.values)))
    silent = code.transposed().offsets.diff() == 0
    assert 0 < silent.sum() < 80 and results[1][0][silent].isnan().all()
    assert torch.equal(results[0][0][~silent], results[1][0][~silent]) and (results[0][0][silent] == 0).all()
    assert torch.equal(results[0][1], results[1][1]) and (results[0][1][silent] == 0).all()


def test_overflow_in_encode(backend, device):
    x, encoder, bias, _, _, _, alpha = autoencoder(n=90, device=device)
    wide = encode_soft_topk(x, encoder, bias, 20, alpha, max_active=96, backend=backend)
    checked = encode_soft_topk(x, encoder, bias, 20, alpha, max_active=4, backend=backend)
    assert wide.counts.max() > 4 and torch.equal(checked.to_dense(), wide.to_dense())
    cut = encode_soft_topk(x, encoder, bias, 20, alpha, max_active=4, check=False, backend=backend)
    assert cut.overflow and cut.max_active == 4 and torch.equal(cut.counts, wide.counts)


class Largest(TorchDispatchMode):
    """The most elements that a tensor made by an operator has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.most = max(self.most, t.numel())
        return out


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_nothing_of_the_size_of_the_latents_is_kept_or_made(backend, device, mode):
    """In the backward of encode and decode, and between forward and backward."""
    if backend == "reference":
        pytest.skip("the reference makes a row for every entry")
    rows, d, n = 64, 4, 2000
    x, encoder, bias, decoder, out, *_ = autoencoder(rows, d, n, device=device, dtype=torch.float32)
    at = leaves(x, encoder, bias, decoder, out)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        if mode == "hard":
            code = encode_hard_topk(*at[:3], 5, backend=backend)
        else:
            code = encode_soft_topk(*at[:3], 5, 0.01, backend=backend)
        loss = sparse_decode(code, at[3], at[4], backend=backend).square().mean()
    with Largest() as made:
        torch.autograd.grad(loss, at)
    assert max(saved) <= n * d < rows * n / 4
    assert made.most < rows * n / 4


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_fifty_steps_of_training(backend, device, mode):
    """Losses and gradients of an autoencoder whose k and alpha learn, equal to the dense one's."""
    skip_if_slow(backend, device, False)

    def train(step):
        x, *start = autoencoder(rows=16, d=6, n=24, seed=5)
        parameters = leaves(*start[:4], torch.full((16,), 4.0, dtype=torch.float64), start[5])
        history = []
        optimizer = torch.optim.SGD(parameters, lr=2e-3, momentum=0.9)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (step(x, *parameters) - x).square().sum(1).mean()
            loss.backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            history.append(torch.cat([loss.detach().reshape(1), *(t.flatten() for t in gradients)]))
            optimizer.step()
        return torch.stack(history)

    def whole(x, encoder, bias, decoder, out, k, alpha):
        pre = linear(x, encoder, bias)
        hard = mode == "straight_through"
        f = dense_hard(pre, k.detach()) if mode == "hard" else dense(pre, k, alpha, hard=hard)
        return f @ decoder + out

    def sparse(*tensors):
        x, encoder, bias, decoder, out, k, alpha = (t.to(device) for t in tensors)
        if mode == "hard":
            code = encode_hard_topk(x, encoder, bias, k, backend=backend)
        else:
            hard = mode == "straight_through"
            code = encode_soft_topk(x, encoder, bias, k, alpha, hard=hard, backend=backend)
        return sparse_decode(code, decoder, out, backend=backend).cpu()

    want, got = train(whole), train(sparse)
    assert want[-1, 0] < 0.8 * want[0, 0]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


# ---- inside PyTorch's machinery


def test_other_derivatives_raise(backend, device):
    pre = torch.rand(2, 9, device=device, requires_grad=True)
    weight = torch.rand(9, 3, device=device, requires_grad=True)
    code = soft_topk_code(pre, 2, backend=backend)
    (first,) = torch.autograd.grad(code.values.sum(), pre, create_graph=True)
    with pytest.raises(NotImplementedError, match="sparse codes have no second derivatives"):
        first.sum().backward()
    out = sparse_decode(code, weight, backend=backend)
    (first,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="sparse codes have no second derivatives"):
        first.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pre.detach(), torch.ones_like(pre))
        with pytest.raises(NotImplementedError, match="sparse codes have no forward-mode derivatives"):
            soft_topk_code(dual, 2, backend=backend)


def test_without_gradient(backend, device):
    x, encoder, bias, decoder, out, k, alpha = leaves(*autoencoder(device=device))
    with torch.no_grad():
        quiet = encode_soft_topk(x, encoder, bias, k, alpha, backend=backend)
        assert not sparse_decode(quiet, decoder, out, backend=backend).requires_grad
    with torch.inference_mode():
        inferred = encode_soft_topk(x, encoder, bias, k, alpha, backend=backend)
    loud = encode_soft_topk(x, encoder, bias, k, alpha, backend=backend)
    assert loud.values.requires_grad and not loud.detach().values.requires_grad
    assert torch.equal(quiet.values, loud.values) and torch.equal(inferred.values, loud.values)


def test_compiled_functions_run_it_as_it_is(backend, device):
    x, encoder, bias, decoder, out, k, alpha = autoencoder(device=device)

    def step(x, encoder):
        code = encode_soft_topk(x * 2, encoder, bias, k, alpha, backend=backend)
        return sparse_decode(code, decoder, out, backend=backend).square().sum() + code.values.sum()

    at = leaves(x, encoder)
    want = step(*at)
    got = torch.compile(step, backend="eager")(*at)
    assert torch.equal(got, want)
    pairs = (torch.autograd.grad(loss, at) for loss in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph(backend, device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    x, encoder, bias, decoder, out, k, alpha = autoencoder(
        rows=32, d=16, n=500, device=device, dtype=torch.float32
    )
    at = leaves(encoder, bias, decoder, out, k, alpha)

    def step():
        encoder, bias, decoder, out, k, alpha = at
        options = {"max_active": 64, "check": False, "backend": backend}
        code = encode_soft_topk(x, encoder, bias, k, alpha, **options)
        loss = (sparse_decode(code, decoder, out, backend=backend) - x).square().mean()
        return [loss, code.overflow, *torch.autograd.grad(loss, at)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for captured, eager in zip(results, step(), strict=True):
        assert torch.equal(captured, eager)
