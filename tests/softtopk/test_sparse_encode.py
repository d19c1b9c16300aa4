"""Encoders whose backward is sparse, alone and with a decoder: gradients, what they keep, a training run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nan
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from softtopk import encode_hard_topk, encode_soft_topk, soft_topk_code, sparse_decode
from tests.conftest import skip_if_slow
from tests.sparse_oracle import autoencoder, dense, dense_hard, leaves


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


def test_a_dtype_stands_for_a_copy_that_is_made(backend, device):
    x, encoder, bias, decoder, out, k, alpha = autoencoder(
        rows=40, d=16, n=60, device=device, dtype=torch.float32
    )
    at, results = leaves(x.bfloat16(), encoder, bias, decoder, out), []
    for copies in ([encoder.bfloat16(), decoder.bfloat16()], [torch.bfloat16] * 2):
        code = encode_soft_topk(at[0], at[1], at[2], k, alpha, copy=copies[0], backend=backend)
        x_hat = sparse_decode(code, at[3], at[4], copy=copies[1], project=True, backend=backend)
        results.append((x_hat, *torch.autograd.grad(x_hat.float().square().sum(), at)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


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
    """The most bytes that a tensor made by an operator has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.most = max(self.most, t.nbytes)
        return out


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_nothing_of_the_size_of_the_latents_is_kept_or_made(backend, device, mode):
    """In the backward of encode and decode, and between forward and backward."""
    if backend == "reference":
        pytest.skip("the reference makes a row for every entry")
    rows, d, n = 64, 8, 800
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
    assert made.most < rows * n  # a quarter of the pre-activations, in float32


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
