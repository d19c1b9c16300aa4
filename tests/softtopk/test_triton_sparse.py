"""The Triton backend's sparse path function by function: chunked rows, long latents, tiles of columns."""

from __future__ import annotations

import pytest
import torch

from softtopk import dispatch
from softtopk.backends import reference_sparse as reference
from tests.cases import make
from tests.conftest import device_of

missing = dispatch.load("triton")[1]
pytestmark = pytest.mark.skipif(missing is not None, reason=f"triton: {missing}")
DEVICE = device_of("triton")
kernels = None if missing is not None else dispatch.sparse_part("triton")


def on_device(*tensors):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors]


@pytest.fixture(params=["kept", "read again", "as a whole"])
def tiny_chunks(request, monkeypatch):
    """Rows are swept 16 elements at a time, and kept for their candidates, read again, or without any."""
    from softtopk.backends.triton import launch

    def tile(name, choice, itemsize, n):
        tiles = 1 << (-(-n // 16) - 1).bit_length()
        whole = request.param == "as a whole"
        shape = dict(TILES=0 if whole else tiles, DEPTH=2, LANES=8, GROUPS=min(2, tiles), SLOTS=2)
        full = not whole and n == 16 * tiles
        options = dict(num_warps=1, maxnreg=choice.maxnreg, CHUNK=16, BLOCK=16, ALIGNED=n % 16 == 0)
        return options | shape | dict(FULL=full, KEEP=request.param == "kept")

    monkeypatch.setattr(launch, "tile", tile)


def assert_same_code(got, want, pre, alpha):
    """The codes agree but for entries at the limit of being one, and their states describe the same row."""
    rows, n = pre.shape
    dense = torch.zeros(2, rows, n + 1, dtype=torch.float64)
    for out, (values, indices, *_) in zip(dense, (got, want), strict=True):
        out.scatter_(1, indices.cpu().long(), values.cpu().double())
    bar = 2.0**-23 if got[0].dtype == torch.float32 else 1e-12
    finite = want[0].isfinite().all(1)
    assert ((dense[0] - dense[1]).abs()[finite] <= bar * (1 + pre.abs().amax())).all()
    assert torch.equal(got[3].cpu(), want[3])
    if want[4] is not None:
        for row in range(rows):
            for a, b in zip(got[4][row].tolist(), want[4][row].tolist(), strict=True):
                assert a == b or abs(a - b) <= 1e-5 * max(1, abs(b)) or (a != a and b != b)


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
@pytest.mark.parametrize("family, n, alpha", [("relu", 75, 0.05), ("tied", 64, 0.3), ("normal", 48, 1e-3)])
def test_chunked_rows(tiny_chunks, family, n, alpha, mode):
    k = torch.tensor([1.0, 0.2 * n, 0.45 * n, n - 0.5, torch.nan], dtype=torch.float64)
    pre = make(family, len(k), n, seed=n).double()
    scale = None if mode == "hard" else alpha
    for places in (64, 80, 5):  # the last: what is cut off belongs to the outside
        got = kernels.code_forward(*on_device(pre, k, scale, None, 0.1, mode, places))
        want = reference.code_forward(pre, k, scale, None, 0.1, mode, places)
        assert torch.equal(got[1].cpu(), want[1])
        assert_same_code(got, want, pre, alpha)
        torch.testing.assert_close(got[2].cpu(), want[2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("alpha", [1.0, 1e-2])
@pytest.mark.parametrize("k", [3.0, 40.0, 77.5])
def test_the_outside_of_a_row(k, alpha):
    """Q_out and M_out, in float32: zeros only, and with positive elements far below the threshold."""
    x = torch.rand(3, 90, generator=torch.Generator().manual_seed(0)) * 30 * alpha
    x[1] -= 15 * alpha
    x[2, 4:] = 0
    for places in (90, 20):
        got = kernels.code_forward(*on_device(x, k, alpha, None, 0.0, "soft", places))
        want = reference.code_forward(x.double(), k, alpha, None, 0.0, "soft", places)
        assert (got[4][:, 5].cpu() - want[4][:, 5]).abs().max() <= 2e-6
        assert (got[4][:, 6].cpu() - want[4][:, 6]).abs().max() <= 1e-5 * (1 + want[4][:, 6].abs().max())
        g = torch.randn(3, places, generator=torch.Generator().manual_seed(1))
        got = kernels.code_backward(got[2], None, *got[3:], alpha, g.to(DEVICE), 1.0)
        want = reference.code_backward(want[2], None, *want[3:], alpha, g.double(), 1.0)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=2e-5)


def test_a_row_of_several_blocks_of_entries():
    """More places than a program of the backward has threads for at once."""
    x = torch.rand(2, 1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = torch.tensor([700.0, 1400.0])
    code = reference.code_forward(x, k, 0.2, None, 0.0, "soft", 1300)
    g = torch.randn(2, 1300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mask in (None, torch.where(code[2] > 0.5, code[2], 0)):
        want = reference.code_backward(code[2], mask, *code[3:], 0.2, g, 0.7)
        arguments = on_device(code[2], mask, *code[3:], 0.2, g, 0.7)
        for a, b in zip(kernels.code_backward(*arguments), want, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("d", [1, 24, 300])
@pytest.mark.parametrize("options", [{}, {"project": True}, {"zero_silent": False}])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_long_latents(monkeypatch, out_dtype, options, d):
    """Chunks of 4 entries: latents of 0, 1, 2 and 9 chunks; and twice the same bits."""
    from softtopk.backends.triton import sparse_gradients

    monkeypatch.setattr(sparse_gradients, "CHUNK", 4)
    draw = torch.Generator().manual_seed(d)
    rows, places, n = 36, 3, 7
    indices = torch.full((rows, places), n, dtype=torch.int32)
    indices[:, 0] = 1  # in every row
    indices[:6, 1], indices[10:14, 1], indices[20:25, 1], indices[20, 2] = 2, 4, 5, 6
    counts = (indices < n).sum(1, dtype=torch.int32)
    scale, y = torch.randn(rows, places, generator=draw), torch.randn(rows, d, generator=draw)
    weight = torch.nn.functional.normalize(torch.randn(n, d, generator=draw), dim=1)
    offsets, entries = reference.transpose(indices, counts, n)
    want = reference.latent_gradients(
        scale.double(),
        indices,
        offsets,
        entries,
        y.double(),
        weight.double(),
        torch.float64,
        True,
        True,
        **options,
    )
    arguments = on_device(scale, indices, offsets, entries, y, weight, out_dtype, True, True)
    got = kernels.latent_gradients(*arguments, **options)
    silent = offsets.diff() == 0
    again = kernels.latent_gradients(*arguments, **options)
    assert all(torch.equal(a[~silent], b[~silent]) for a, b in zip(got[::2], again[::2], strict=True))
    assert got[0].dtype == out_dtype and torch.equal(got[1], again[1]) and torch.equal(got[3], again[3])
    if "zero_silent" in options:
        assert got[0][silent].isnan().all()  # as torch.empty made it
        got[0][silent] = want[0][silent] = 0
    tolerance = 1e-5 if out_dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(got[0].cpu().double(), want[0], rtol=tolerance, atol=1e-5)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)
    assert kernels.latent_gradients(*arguments[:5], None, out_dtype, False, False)[1:] == (None, None, None)


def test_a_bias_is_rounded_as_torch_rounds():
    draw = torch.Generator().manual_seed(0)
    pre, bias = torch.randn(2, 200, generator=draw).bfloat16(), torch.randn(200, generator=draw).bfloat16()
    got = kernels.code_forward(*on_device(pre, 40, None, bias, 0.0, "hard", 64))
    want = reference.code_forward(pre, 40, None, bias, 0.0, "hard", 64)
    assert torch.equal(got[1].cpu(), want[1]) and torch.equal(got[0].cpu(), want[0])


@pytest.mark.gpu
def test_a_step_in_a_graph():
    """Nothing waits for the device: forward and backward are captured and replayed on other data."""
    from softtopk import encode_soft_topk, sparse_decode

    rows, d, n = 300, 64, 1000
    draw = torch.Generator().manual_seed(0)
    x, encoder, decoder = (torch.randn(s, generator=draw).cuda() for s in ((rows, d), (n, d), (n, d)))
    encoder.requires_grad_(), decoder.requires_grad_()

    def step():
        code = encode_soft_topk(x, encoder, None, 20.0, 0.05, max_active=64, check=False, backend="triton")
        loss = (sparse_decode(code, decoder, backend="triton") - x).square().mean()
        return loss, *torch.autograd.grad(loss, [encoder, decoder])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(rows, d, generator=draw))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
