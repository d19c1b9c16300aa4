"""Times the parts of a step that are as large as its weights: Adam, and the wide estimator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.codes import TORCH, draw_latents
from benchmarks.sparse_bars import ADAM_BYTES, AUTOGRAD, FUSED_ADAM, Cell
from benchmarks.sparse_measure import copies_for, device_ms, measured, peer_ms, worst
from softtopk import dispatch, relu_projection
from softtopk.optim import Adam

COPY_BYTES = 2  # a bfloat16 copy of the parameter, written
LR = 1e-3


def adam(cell: Cell, device: str, per_byte_ms: float) -> dict:
    """A step on the two weights (n, d) of an autoencoder with their bfloat16 copies, of all rows or of those
    that a code of Zipf's law has; torch's without copies."""
    n, d = cell.n, cell.d
    generator = torch.Generator(device).manual_seed(0)
    copies = copies_for(2 * n * d * 16, device)
    offsets = None
    share = 1.0
    if cell.op != "Adam":
        at = draw_latents(cell.rows, int(cell.k), n, cell.latents, device)
        offsets = dispatch.sparse_part(cell.backend).transpose(at.indices, at.counts, n)[0]
        share = (offsets[1:] != offsets[:-1]).double().mean().item()

    def weights() -> list[Tensor]:
        made = [torch.randn(n, d, device=device, generator=generator) for _ in range(2)]
        for weight in made:
            weight.grad = torch.randn(n, d, device=device, generator=generator)
        return made

    def ours(parameters: list[Tensor]) -> Callable[[], object]:
        half = {p: p.to(torch.bfloat16) for p in parameters}
        optimizer = Adam(parameters, lr=LR, copies=half)
        active = None if offsets is None else {p: offsets for p in parameters}
        return partial(optimizer.step, active=active)

    def torchs(parameters: list[Tensor]) -> Callable[[], object]:
        optimizer = torch.optim.Adam(parameters, lr=LR, fused=True, capturable=device != "cpu")
        return optimizer.step

    error = adam_error(weights, ours, torchs) if offsets is None else None
    ms = device_ms([ours(weights()) for _ in range(copies)], device)
    peers = peer_ms(FUSED_ADAM, [torchs(weights()) for _ in range(copies)], device)
    size = int(2 * n * d * (ADAM_BYTES + COPY_BYTES) * share)
    return measured(cell, ms, size * per_byte_ms, size, error, peers=peers, rows_updated=round(share, 4))


def adam_error(weights: Callable, ours: Callable, torchs: Callable) -> float:
    """Of parameters after a step, beside torch's, over the learning rate."""
    a = weights()
    b = [p.clone() for p in a]
    for p, q in zip(a, b, strict=True):
        q.grad = p.grad.clone()
    ours(a)()
    torchs(b)()
    return max(worst((p - q).abs()) for p, q in zip(a, b, strict=True))


def estimator(cell: Cell, device: str, per_byte_ms: float) -> dict:
    """relu(x W^T + c) . w2 with its gradients of W, c and w2: ours, and two layers under autograd with the
    same float32 weights (in bfloat16 under autocast). Peak memory beside the arguments and the gradients."""
    rows, n, d = cell.rows, cell.n, cell.d
    dtype = TORCH[cell.dtype]
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    copies = copies_for((n * d + rows * d) * 4, device)
    data = []
    for _ in range(min(copies, 4)):
        leaves = [(scale * draw(size)).requires_grad_() for size, scale in (((n, d), d**-0.5), ((n,), 0.1))]
        leaves.append((n**-0.5 * draw(n)).requires_grad_())
        copy = None if dtype == torch.float32 else leaves[0].detach().to(dtype)
        data.append((draw(rows, d), leaves, copy, draw(rows)))

    def ours(x: Tensor, leaves: list[Tensor], copy: Tensor | None, g: Tensor):
        W, c, w2 = leaves
        score = relu_projection(x, W, c, w2, copy=copy, backend=cell.backend)
        return torch.autograd.grad(score, leaves, g)

    def plain(x: Tensor, leaves: list[Tensor], copy: Tensor | None, g: Tensor):
        W, c, w2 = leaves
        with torch.autocast(x.device.type, dtype, enabled=copy is not None, cache_enabled=False):
            score = torch.relu(torch.nn.functional.linear(x, W, c)) @ w2
        return torch.autograd.grad(score, leaves, g.to(score.dtype))

    got, want = ours(*data[0]), plain(*data[0])
    error = max(worst((a - b).abs()) / float(b.abs().max()) for a, b in zip(got, want, strict=True))
    del got, want
    memory = [peak_bytes(partial(call, *data[0]), device) for call in (ours, plain)]
    ms = device_ms([partial(ours, *each) for each in data], device)
    peers = peer_ms(AUTOGRAD, [partial(plain, *each) for each in data], device)
    # Three products; x and the weights read for each of them, the gradient written.
    size = 3 * (rows * d + n * d) * dtype.itemsize + 4 * n * d
    flops_ms = 2 * 2.0 * rows * n * d / 700e12 * 1e3
    floor = max(flops_ms, size * per_byte_ms) if cell.dtype == "bfloat16" else size * per_byte_ms
    row = measured(cell, ms, floor, size, None, peers=peers, difference=round(error, 6))
    return row | {"peak_bytes": memory[0], "peer_peak_bytes": memory[1]}


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """The most that a call has allocated at a time, its results included."""
    if device == "cpu":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - held
