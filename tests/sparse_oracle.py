"""What the sparse path must equal: the dense composite that it replaces, by autograd, and how near."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp

from softtopk import SparseCode, hard_topk, soft_topk

SMALLEST = 2.0**-24


def activation(pre: Tensor, bias: Tensor | None = None, threshold: float | Tensor = 0.0) -> Tensor:
    z = pre if bias is None else pre + bias.to(pre.dtype)
    return torch.where(z <= threshold, 0, z)


def dense(
    pre: Tensor,
    k: float | Tensor,
    alpha: float | Tensor,
    bias: Tensor | None = None,
    threshold: float | Tensor = 0.0,
    hard: bool = False,
    selection_gradient: float = 1.0,
) -> Tensor:
    """The dense tensor of soft_topk_code, and by autograd its gradients; float64 pre (rows, n)."""
    a = activation(pre, bias, threshold)
    routed = a.clone()
    if routed.requires_grad:  # the gradient of a is 0 where there is no entry
        routed.register_hook(lambda g: torch.where(kept, g * selection_gradient, 0))
    p = soft_topk(routed, k, alpha, hard=hard, backend="reference")
    with torch.no_grad():
        budget = torch.as_tensor(k, dtype=torch.float64, device=pre.device).detach()
        soft, q = soft_and_share(a.detach(), budget.expand(len(pre)).clone(), alpha)
        kept = (a > 0) & ((soft >= SMALLEST) | (q >= SMALLEST) | (hard & (p == 1)))
    f = torch.where(kept, a * p, 0)
    return f if hard else f - torch.where(soft < SMALLEST, f, 0).detach()


def soft_and_share(a: Tensor, k: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """p, and q = dp/dk by forward mode."""
    alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha
    return jvp(lambda k: soft_topk(a, k, alpha, backend="reference"), (k,), (torch.ones_like(k),))


def dense_hard(pre: Tensor, k: float | Tensor, bias: Tensor | None = None, threshold=0.0) -> Tensor:
    """The dense tensor of hard_topk_code."""
    a = activation(pre, bias, threshold)
    return a * hard_topk(a.detach(), k, backend="reference")


def places(code: SparseCode, dense_values: Tensor) -> Tensor:
    """The elements of a dense (rows, n) at the places of a code, (rows, C); 0 in unused ones."""
    n = dense_values.shape[1]
    found = dense_values.gather(1, code.indices.long().clamp(max=n - 1))
    return torch.where(code.indices < n, found, 0)


def assert_well_formed(code: SparseCode):
    """Sorted rows, padded with n and 0."""
    rows, C = code.values.shape
    n = code.shape[-1]
    assert code.indices.dtype == code.counts.dtype == torch.int32
    assert code.indices.shape == (rows, C) and code.counts.shape == (rows,)
    used = torch.arange(C, device=code.device) < code.counts.unsqueeze(1)
    assert ((code.indices < n) == used).all() and (code.indices >= 0).all()
    assert (code.indices[~used] == n).all() and (code.values[~used] == 0).all()
    assert (code.indices.diff(dim=1)[used[:, 1:]] > 0).all()


def assert_values(code: SparseCode, want: Tensor, a: Tensor):
    """A code in float32 at the bars: 1e-6 in p, and an entry whose p lies near 2^-24 may be missing."""
    got, want, a = code.to_dense().detach().double().cpu(), want.detach().double().cpu(), a.double().cpu()
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0, (got - want).abs())
    bar = (1e-6 + 2.0**-23) * a.abs() + 2.0**-149
    assert (error <= bar).all(), f"{(error / bar).nan_to_num(posinf=torch.inf).max()} times the bar"


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def autoencoder(rows=8, d=6, n=24, seed=0, device="cpu", dtype=torch.float64):
    """x, encoder weight and bias, decoder weight and bias, k, alpha; all float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rows, d), (n, d), (n,), (n, d), (d,)]
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    k = 1 + 6 * torch.rand(rows, generator=draw, dtype=torch.float64)
    return [t.to(device, dtype) for t in tensors] + [k.to(device), torch.tensor(0.2, device=device).double()]
