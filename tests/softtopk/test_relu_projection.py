"""relu_projection against the dense layers it stands for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import softtopk
from softtopk import relu_projection
from softtopk.backends import projection
from tests.waiting import record

# (B, d, n): fewer than a byte of columns, odd, more than a chunk's multiple, a whole number of chunks.
SHAPES = [(1, 1, 1), (5, 7, 3), (3, 12, 33), (9, 5, 257), (37, 8, 700), (17, 20, 1024), (70, 3, 300)]


@pytest.fixture(params=["torch", "cuda"])
def steps(request) -> tuple[object, str]:
    """What is done between the products, and the device where it is done."""
    if request.param == "torch":
        return projection.TorchSteps, "cpu"
    if (reason := softtopk.available_backends()["cuda"]) is not None:
        pytest.skip(f"cuda: {reason}")
    from softtopk.backends import cuda

    return cuda.projection.steps, "cuda"


@pytest.fixture
def small_products(monkeypatch):
    """Products of as few columns as there may be, of chunks that have more."""
    monkeypatch.setattr(projection, "PRODUCT_BYTES", 1)


@pytest.fixture
def small_chunks(monkeypatch, small_products):
    """Chunks of as few columns as there may be."""
    monkeypatch.setattr(projection, "CHUNK_BYTES", 1)


def problem(shape, device, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x, weight, bias and w2, which want gradients."""
    rows, d, n = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, d), (n, d), (n,), (n,))
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def dense(x, weight, bias, w2) -> Tensor:
    return torch.relu(x @ weight.T + bias) @ w2


def weights_of(scores: Tensor) -> Tensor:
    """Another gradient for every row, one of them 0."""
    return torch.arange(len(scores), dtype=scores.dtype, device=scores.device).sub(1).cos().sub(1)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps(steps, shape, kind):
    """Each by its formula, in double precision from the same rounded numbers."""
    steps, device = steps
    rows, d, n = shape
    wide = torch.float64 if kind == torch.float64 else torch.float32

    def given(t, dtype):
        """A tensor for the steps, and what they see of it."""
        t = t.detach().to(dtype)
        return t.to(device), t.double()

    def empty(*size, dtype=wide):
        return torch.empty(size, dtype=dtype, device=device)

    def columns():
        return projection.columns_of(empty(rows * (n + 7), dtype=kind), rows, slice(0, n))

    def close(got, want, rounding=0.0):
        exact = 1e-12 if kind == torch.float64 else 1e-5
        torch.testing.assert_close(got.cpu().double(), want, rtol=max(exact, rounding), atol=exact * n**0.5)

    x, weight, bias, w2 = problem(shape, "cpu", torch.float64)
    hidden, seen = given(x @ weight.T + bias, kind)
    (weight, weights), (bias, biases), (w2, w2s) = given(weight, kind), given(bias, kind), given(w2, wide)
    scores, mask = empty(rows), empty(rows, (n + 7) // 8, dtype=torch.uint8)
    z = columns().copy_(hidden)
    for times, add in (1, False), (2, True):
        steps.relu_dot(z, w2, add, scores, mask)
        close(scores, times * (seen.relu() @ w2s))
    on = (seen > 0).double()
    assert torch.equal(projection.unpack(mask.cpu(), n).double(), on)

    g, gs = given(weights_of(x[:, 0]), wide)
    expanded = columns()
    sums = steps.expand_mask(mask, g, expanded)
    assert torch.equal(expanded.cpu(), (gs[:, None] * on).to(kind))
    gamma = on.T @ gs
    close(sums.sum(0), gamma)

    products, of = given(torch.randn(n, d, generator=torch.Generator().manual_seed(1)), wide)
    for out in dict.fromkeys((kind, wide)):
        to_weight, (to_bias, to_w2, squares) = empty(n, d, dtype=out), (empty(n) for _ in range(3))
        steps.scale_gradient(products, weight, bias, w2, sums, to_weight, to_bias, to_w2, squares)
        scaled = of * w2s[:, None]
        close(to_weight, scaled, 0.51 * torch.finfo(out).eps)
        close(to_bias, w2s * gamma)
        close(to_w2, (of * weights).sum(1) + biases * gamma)
        squared = to_weight.double() if steps is projection.TorchSteps else scaled  # before rounding
        close(squares, squared.square().sum(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_is_the_dense_layer(backend, device, shape, dtype, small_chunks):
    arguments = problem(shape, device, dtype)
    scores = relu_projection(*arguments, backend=backend)
    expected = dense(*arguments)
    assert scores.dtype == dtype and scores.shape == (shape[0],)
    exact = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(scores, expected, rtol=exact, atol=exact * shape[2] ** 0.5)
    g = weights_of(scores)
    gradients = torch.autograd.grad(scores, arguments, g)
    wanted = torch.autograd.grad(expected, arguments, g)
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=exact, atol=exact * float(want.abs().max() + 1))


def test_several_products_of_a_chunk(backend, device, small_products):
    arguments = problem((75, 6, 700), device, torch.float64)
    scores, expected = relu_projection(*arguments, backend=backend), dense(*arguments)
    torch.testing.assert_close(scores, expected)
    g = weights_of(scores)
    gradients = torch.autograd.grad(scores, arguments, g)
    for got, want in zip(gradients, torch.autograd.grad(expected, arguments, g), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 2, 260)], ids=str)
def test_gradcheck(backend, device, shape, small_chunks):
    arguments = problem(shape, device, torch.float64, seed=1)
    assert torch.autograd.gradcheck(
        lambda *a: relu_projection(*a, backend=backend), arguments, fast_mode=shape[2] > 100
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_are_added_up_in_the_compute_dtype(device, kind):
    a, b = (torch.randn(40, n, device=device).to(kind) for n in (24, 16))
    wide = torch.float64 if kind == torch.float64 else torch.float32
    total = projection.multiply(a.t(), b, torch.empty(24, 16, dtype=wide, device=device))
    projection.add_product(total, a.t(), b)
    want = 2 * (a.double().t() @ b.double())
    assert total.dtype == wide and (total - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(33, 16, 520), (20, 7, 301)], ids=str)
def test_mixed_precision(backend, device, kind, shape, small_chunks):
    x, weight, bias, w2 = problem(shape, device)
    copy = weight.detach().to(kind)
    scores = relu_projection(x, weight, bias, w2, copy=copy, backend=backend)
    g = weights_of(scores)
    gradients = torch.autograd.grad(scores, (x, weight, bias, w2), g)
    assert [t.dtype for t in (scores, *gradients)] == [torch.float32] * 5
    again = relu_projection(x, weight, bias, w2, copy=kind, backend=backend)  # rounded by the chunk
    repeated = again, *torch.autograd.grad(again, (x, weight, bias, w2), g)
    for a, b in zip(repeated, (scores, *gradients), strict=True):
        assert torch.equal(a, b)

    rounded = [t.detach().to(kind).double().requires_grad_() for t in (x, copy, bias)]
    rounded.append(w2.detach().double().requires_grad_())
    expected = dense(*rounded)
    ulp = torch.finfo(kind).eps / 2
    hidden = torch.relu(rounded[0] @ rounded[1].T + rounded[2])
    bound = 1.5 * ulp * (hidden @ rounded[3].abs()) + 1e-4  # every element of it is rounded once
    assert ((scores.double() - expected).abs() <= bound).all()
    wanted = torch.autograd.grad(expected, rounded, g.double())
    # g x and, for x, w2 W are rounded: a sum of such terms is off by no more than the sum of what each is.
    absolute = [g.abs().double(), *(t.detach().abs() for t in rounded)]
    on = (hidden > 0).double()
    sums = on.T @ (absolute[0][:, None] * absolute[1])
    bounds = (
        absolute[0][:, None] * (on @ (absolute[4][:, None] * absolute[2])),
        absolute[4][:, None] * sums,
        torch.zeros_like(wanted[2]),
        (absolute[2] * sums).sum(1),
    )
    for got, want, most in zip(gradients, wanted, bounds, strict=True):
        assert ((got.double() - want).abs() <= 1.1 * ulp * most + 2e-5 * want.abs().max()).all()


def test_low_precision_weights_get_gradients_of_their_dtype(backend, device):
    arguments = [t.detach().bfloat16().requires_grad_() for t in problem((6, 8, 40), device)]
    scores = relu_projection(*arguments, backend=backend)
    assert scores.dtype == torch.float32
    gradients = torch.autograd.grad(scores, arguments, weights_of(scores))
    wide = [t.detach().double().requires_grad_() for t in arguments]
    wanted = torch.autograd.grad(dense(*wide), wide, weights_of(scores).double())
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.03 * float(want.abs().max()))


def test_only_the_gradients_that_are_asked_for(backend, device):
    x, weight, bias, w2 = problem((5, 4, 20), device)
    scores = relu_projection(x.detach(), weight, bias.detach(), w2, backend=backend)
    scores.sum().backward()
    assert x.grad is None and bias.grad is None
    wanted = torch.autograd.grad(dense(x, weight, bias, w2).sum(), (weight, w2))
    torch.testing.assert_close(weight.grad, wanted[0])
    torch.testing.assert_close(w2.grad, wanted[1])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_squares(backend, device, kind, small_chunks):
    x, weight, bias, w2 = problem((20, 9, 301), device)
    squares = torch.full((301,), float("nan"), device=device)
    copy = weight.detach().to(kind)
    relu_projection(x, weight, bias, w2, copy=copy, squares=squares, backend=backend).sum().backward()
    torch.testing.assert_close(squares, weight.grad.square().sum(1), rtol=1e-5, atol=0)


def test_leading_dimensions_and_strides(backend, device):
    x, weight, bias, w2 = (t.detach() for t in problem((24, 6, 50), device))
    expected = dense(x, weight, bias, w2)
    kwargs = dict(backend=backend)
    torch.testing.assert_close(
        relu_projection(x.view(2, 3, 4, 6), weight, bias, w2, **kwargs), expected.view(2, 3, 4)
    )
    torch.testing.assert_close(relu_projection(x[0], weight, bias, w2, **kwargs), expected[0])
    strided = torch.stack([weight, weight], 2)[..., 0]
    torch.testing.assert_close(
        relu_projection(x.T.contiguous().T, strided, bias, w2.expand(2, 50)[1], **kwargs), expected
    )


def test_empty_batch(backend, device):
    x, weight, bias, w2 = problem((0, 6, 50), device)
    scores = relu_projection(x, weight, bias, w2, backend=backend)
    assert scores.shape == (0,)
    scores.sum().backward()
    assert not weight.grad.any() and not bias.grad.any() and not w2.grad.any()


def test_not_finite_rows_stay_alone(backend, device):
    x, weight, bias, w2 = (t.detach() for t in problem((20, 6, 70), device))
    clean = relu_projection(x, weight, bias, w2, backend=backend)
    x[3, 2] = float("nan")
    scores = relu_projection(x, weight, bias, w2, backend=backend)
    assert scores[3].isnan()
    others = torch.arange(20, device=device) != 3
    torch.testing.assert_close(scores[others], clean[others])


def test_the_hidden_layer_is_not_kept(backend, device):
    arguments = problem((64, 4, 512), device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        relu_projection(*arguments, backend=backend)
    assert max(t.numel() * t.element_size() for t in kept) <= max(64 * 512 // 8, 512 * 4 * 4)


def test_bit_equal_from_run_to_run(backend, device, small_chunks):
    def run():
        arguments = problem((67, 9, 600), device)
        scores = relu_projection(*arguments, backend=backend)
        return scores, *torch.autograd.grad(scores, arguments, weights_of(scores))

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_bits_are_packed():
    bits = torch.rand(5, 19) < 0.5
    packed = projection.pack(bits)
    assert packed.shape == (5, 3) and packed.dtype == torch.uint8
    assert packed[2, 1] == sum(int(bits[2, 8 + i]) << i for i in range(8))
    assert torch.equal(projection.unpack(packed, 19).bool(), bits)


def test_errors():
    x, weight, bias, w2 = (t.detach() for t in problem((3, 4, 6), "cpu"))
    for wrong, error in [
        ((x[:, :3], weight, bias, w2), ValueError),
        ((x, weight[0], bias, w2), ValueError),
        ((x, weight, bias[:5], w2), ValueError),
        ((x, weight, bias, w2[None]), ValueError),
        ((x.int(), weight, bias, w2), TypeError),
        ((x, weight, bias, 1.0), TypeError),
        ((x, weight, bias.to("meta"), w2), ValueError),
    ]:
        with pytest.raises(error):
            relu_projection(*wrong)
    with pytest.raises(ValueError, match="copy"):
        relu_projection(x, weight, bias, w2, copy=weight[:3])
    with pytest.raises(TypeError, match="copy"):
        relu_projection(x, weight, bias, w2, copy=torch.int8)
    for squares in (torch.zeros(5), torch.zeros(6, dtype=torch.float64), torch.zeros(12)[::2]):
        with pytest.raises(ValueError, match="squares"):
            relu_projection(x, weight, bias, w2, squares=squares)


@pytest.mark.skipif(sys.platform != "linux", reason="triton's ptxas is a Linux program")
def test_kernels_compile_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_projection.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bytes") == 9


@pytest.mark.gpu
class TestOnTheGpu:
    @pytest.fixture(params=["cuda", "triton"])
    def backend(self, request) -> str:
        if (reason := softtopk.available_backends()[request.param]) is not None:
            pytest.skip(f"{request.param}: {reason}")
        return request.param

    @pytest.mark.parametrize("shape", [(512, 256, 20000), (1000, 333, 4099)], ids=str)
    def test_large_products(self, backend, shape):
        x, weight, bias, w2 = problem(shape, "cuda")
        copy = weight.detach().bfloat16()
        scores = relu_projection(x, weight, bias, w2, copy=copy, backend=backend)
        g = weights_of(scores)
        gradients = torch.autograd.grad(scores, (weight, bias, w2), g)
        wide = [t.detach().bfloat16().double().requires_grad_() for t in (x, copy, bias)]
        wide.append(w2.detach().double().requires_grad_())
        expected = dense(*wide)
        wanted = torch.autograd.grad(expected, wide[1:], g.double())
        for got, want in zip((scores, *gradients), (expected, *wanted), strict=True):
            error = (got.double() - want).norm() / want.norm()
            assert error < 3e-3, error

    def test_in_a_graph_without_waiting(self, backend):
        x, weight, bias, w2 = problem((300, 64, 3000), "cuda")
        copy = weight.detach().bfloat16()
        x = x.detach()

        def step():
            scores = relu_projection(x, weight, bias, w2, copy=copy, backend=backend)
            return scores, *torch.autograd.grad(scores, (weight, bias, w2), torch.ones_like(scores))

        graph, results = record(step)
        x.copy_(torch.randn_like(x))
        graph.replay()
        for got, want in zip(results, step(), strict=True):
            assert torch.equal(got, want)
