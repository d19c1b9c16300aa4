"""The operator inside PyTorch's machinery: derivatives of any kind, torch.func, compile, export, hooks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from softtopk import hard_topk, log_soft_topk, ops, soft_topk

FUNCTIONS = {
    "p": soft_topk,
    "log": log_soft_topk,
    "log_complement": functools.partial(log_soft_topk, complement=True),
}


@pytest.fixture(params=FUNCTIONS)
def form(request) -> str:
    return request.param


def problem(device: str = "cpu", rows: int = 3, n: int = 5, dtype=torch.float64, seed: int = 0):
    """x (rows, n), k and alpha (rows,); a float64 row is far from the kinks at t = 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g, dtype=torch.float64)
    k = 0.2 + (n - 0.4) * torch.rand(rows, generator=g, dtype=torch.float64)
    alpha = 0.3 + torch.rand(rows, generator=g, dtype=torch.float64)
    return tuple(t.to(device, dtype) for t in (x, k, alpha))


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def assert_close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-9)


# ---- derivatives


@pytest.mark.parametrize("largest", [True, False])
def test_first_derivatives_in_both_modes(backend, device, form, largest):
    function = functools.partial(FUNCTIONS[form], backend=backend, largest=largest)
    quick = backend == "triton"  # whose interpreter takes a tenth of a second a row
    assert gradcheck(
        function,
        leaves(*problem(device)),
        eps=1e-7,
        atol=1e-5,
        check_forward_ad=True,
        check_batched_grad=not quick,
        check_batched_forward_grad=not quick,
        fast_mode=quick,
    )


@pytest.mark.parametrize("largest", [True, False])
def test_second_derivatives(backend, device, form, largest):
    function = functools.partial(FUNCTIONS[form], backend=backend, largest=largest)
    quick = backend == "triton"
    inputs = leaves(*problem(device, rows=2, n=4, seed=1))
    assert gradgradcheck(function, inputs, eps=1e-7, atol=1e-4, check_fwd_over_rev=not quick, fast_mode=quick)


def test_all_orders_of_two_derivatives_agree(form):
    def loss(x, k, alpha):
        return FUNCTIONS[form](x, k, alpha).square().sum()

    arguments = problem(rows=2, n=4)
    outer_inner = [(jacfwd, jacrev), (jacrev, jacrev), (jacfwd, jacfwd), (jacrev, jacfwd)]
    want, *others = (a(b(loss, (0, 1, 2)), (0, 1, 2))(*arguments) for a, b in outer_inner)
    for got in others:
        assert_close(got, want)
    x, k, alpha = arguments
    assert_close(hessian(loss)(x, k, alpha), want[0][0])
    full = want[0][0].reshape(8, 8)
    assert full.abs().max() > 0.1
    assert_close(full, full.T)


def test_second_derivatives_in_a_gap():
    """k an integer in a gap of 1000 alpha: R = exp(-500) is 0 in float32; what needs no 1 / R is right."""
    x = torch.tensor([2.0, 2.001, 1.0, 0.9995])
    k, alpha = torch.tensor(2.0), torch.tensor(1e-3)
    v = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def second(dtype):
        arguments = leaves(*(t.to(dtype) for t in (x, k, alpha)))
        p = soft_topk(*arguments)
        to_x, to_k, to_alpha = torch.autograd.grad(p, arguments, v.to(dtype), create_graph=True)
        of_k = torch.autograd.grad(to_k, arguments, retain_graph=True)
        rest = torch.autograd.grad(to_x.sum() + to_alpha, arguments)
        return of_k, rest

    (to_x, to_k, to_alpha), rest = second(torch.float32)
    want, _ = second(torch.float64)
    scale = want[0].abs().max()
    assert scale > 100
    assert_close(to_x.double(), want[0], atol=1e-4 * scale.item())
    assert_close(to_alpha.double(), want[2], atol=1e-6 * 1000 / 1e-3)  # of its terms, |t| / alpha
    assert to_k.isinf() and to_k.sign() == want[1].sign()  # 1e217 or so in float64
    assert all(t.isfinite().all() for t in rest[:1])


def test_third_derivatives_are_refused_clearly():
    x = torch.randn(5, dtype=torch.float64)
    third = jacrev(hessian(lambda x: soft_topk(x, 2).square().sum()))
    with pytest.raises(NotImplementedError, match="no third derivatives"):
        third(x)


def test_straight_through(backend, device):
    """hard=True: the mask, with the derivatives of p in either mode."""
    x, k, alpha = leaves(*problem(device, dtype=torch.float32))
    mask = soft_topk(x, k, alpha, hard=True, backend=backend)
    assert torch.equal(mask, hard_topk(x.detach(), k.detach(), backend=backend))
    v = torch.randn_like(x)
    want = torch.autograd.grad(soft_topk(x, k, alpha, backend=backend), (x, k, alpha), v)
    for got, w in zip(torch.autograd.grad(mask, (x, k, alpha), v), want, strict=True):
        assert torch.equal(got, w)
    function = functools.partial(soft_topk, k=2, backend=backend)
    hard = jvp(functools.partial(function, hard=True), (x.detach(),), (v,))
    soft = jvp(function, (x.detach(),), (v,))
    assert torch.equal(hard[1], soft[1]) and not torch.equal(hard[0], soft[0])


def test_masks_and_indices_are_constants():
    x = torch.randn(3, 6, requires_grad=True)
    mask = hard_topk(x, 2)
    values, indices, counts = hard_topk(x, 2, return_indices=True)
    assert not mask.requires_grad and not indices.requires_grad and not counts.requires_grad
    (got,) = torch.autograd.grad(values.sum(), x)
    assert torch.equal(got, mask)
    assert torch.equal(grad(lambda x: (hard_topk(x, 2) * x).sum())(x.detach()), mask)


# ---- torch.func


def mapped(function, in_dims, *arguments: Tensor) -> Tensor:
    """vmap written as a loop."""
    size = next(a.shape[d] for a, d in zip(arguments, in_dims, strict=True) if d is not None)
    calls = (
        [a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)]
        for i in range(size)
    )
    return torch.stack([function(*call) for call in calls])


@pytest.mark.parametrize(
    "in_dims,shapes",
    [
        ((0, 0, 0), ((4, 3, 5), (4, 3), (4, 3))),
        ((1, None, None), ((3, 4, 5), (3,), ())),
        ((None, 0, 1), ((3, 5), (4, 1), (3, 4))),
        ((2, 1, None), ((3, 5, 4), (3, 4), (3,))),
        ((None, None, 0), ((5,), (), (4,))),
        ((0, None, 0), ((4, 5), (), (4,))),
    ],
)
def test_vmap(backend, device, form, in_dims, shapes):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shapes[0], generator=g).to(device)
    k = (0.5 + 4 * torch.rand(shapes[1], generator=g)).to(device)
    alpha = (0.1 + torch.rand(shapes[2], generator=g)).to(device)

    def function(x, k, alpha):
        return FUNCTIONS[form](x, k, alpha, backend=backend)

    want = mapped(function, in_dims, x, k, alpha)
    torch.testing.assert_close(vmap(function, in_dims)(x, k, alpha), want, atol=1e-6, rtol=1e-5)


def test_vmap_of_hard_topk(backend, device):
    x = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)).to(device)
    k = torch.tensor([1.0, 3.0, 5.0], device=device)

    def function(x, k):
        return hard_topk(x, k, dim=0, max_k=4, return_indices=True, backend=backend)

    for got, want in zip(
        vmap(function)(x, k), hard_topk(x, k[:, None], dim=1, max_k=4, return_indices=True, backend=backend),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want)
    assert torch.equal(vmap(lambda x: hard_topk(x, 2, backend=backend), 2, 2)(x), hard_topk(x, 2, dim=1))


def test_per_sample_gradients():
    """vmap(grad) and grad(vmap) against a loop; x is shared, k is mapped."""
    x, k, alpha = problem(rows=4)

    def loss(x, k):
        return (soft_topk(x, k, 0.5).cumsum(-1) ** 2).sum()

    want = torch.stack([grad(loss)(x[0], one) for one in k])
    assert_close(vmap(grad(loss), (None, 0))(x[0], k), want)
    assert_close(grad(lambda x: vmap(loss, (None, 0))(x, k).sum())(x[0]), want.sum(0))


def test_vjp_and_jvp_agree(backend, device, form):
    """<v, J u> = <J^T v, u> in float32."""
    primals = problem(device, rows=2, n=7, dtype=torch.float32, seed=3)
    function = functools.partial(FUNCTIONS[form], backend=backend)
    directions = tuple(torch.randn_like(t) for t in primals)
    y, moved = jvp(function, primals, directions)
    v = torch.randn_like(y)
    gradients = vjp(function, *primals)[1](v)
    back = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close((v * moved).sum(), back, rtol=1e-4, atol=1e-4)


# ---- torch.compile and torch.export


def everything(x, k, alpha, backend):
    """Every public function in one graph."""
    p, b = soft_topk(x, k, alpha, return_threshold=True, backend=backend)
    mask = soft_topk(x, 3, 0.1, dim=0, hard=True, backend=backend)
    values, _, counts = hard_topk(x, 2, return_indices=True, backend=backend)
    logs = log_soft_topk(x, k, alpha, backend=backend).exp() + log_soft_topk(x, 1, 0.5, complement=True)
    return ((p + mask + logs) * x).sum() + (values.sum(-1) * counts * b).sum() + hard_topk(x, k).sum()


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compile_without_breaks_or_needless_recompilation(backend, device, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows in (4, 4) if dynamic is False or backend == "triton" else (4, 5, 6, 9):
        arguments = leaves(*problem(device, rows=rows, dtype=torch.float32))
        got, want = (f(*arguments, backend) for f in (compiled, everything))
        assert torch.equal(got, want)
        for one, other in zip(
            torch.autograd.grad(got, arguments), torch.autograd.grad(want, arguments), strict=True
        ):
            assert torch.equal(one, other)
    # Where torch decides (None), the second size makes the first dynamic graph, which then serves all.
    assert counter.frame_count == (2 if dynamic is None and backend != "triton" else 1)


def test_compile_of_torch_func():
    torch._dynamo.reset()
    x = torch.randn(4, 7)
    inner = functools.partial(soft_topk, k=2.5, alpha=0.3)
    for function in (
        vmap(grad(lambda x: inner(x).square().sum())),
        lambda x: jvp(lambda y: inner(y).square().sum(), (x,), (x.cos(),))[1],
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), function(x))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, k):
            return soft_topk(x, k, 0.1).mul(x) + log_soft_topk(x, 2.5)

    rows = torch.export.Dim("rows")
    exported = torch.export.export(
        Model(), (torch.randn(4, 7), torch.rand(4)), dynamic_shapes={"x": {0: rows}, "k": {0: rows}}
    )
    x, k = torch.randn(9, 7), 6 * torch.rand(9)
    assert torch.equal(exported.module()(x, k), Model()(x, k))


def operator_calls():
    """Arguments for each operator: contiguous and transposed x, numbers and tensors."""
    x, k, alpha = problem(dtype=torch.float32)
    v = torch.randn_like(x)
    _, solution = ops.soft_topk_op(x, k, 0.0, alpha, 0.0, True, "p", None)
    turned = x.t().contiguous().t()
    solved = (x, k, alpha, 0.0, solution)
    return [
        ("soft_topk", (x, k, 0.0, alpha, 0.0, True, "p")),
        ("soft_topk", (turned, None, 2.0, None, 0.1, False, "log")),
        ("soft_topk", (x.expand(2, 3, 5), None, 2.0, alpha.expand(2, 3), 0.1, True, "hard")),
        ("soft_topk_backward", (*solved, v, True, "p")),
        ("soft_topk_backward", (turned, None, alpha, 0.0, solution, v[:1].expand(3, 5), False, "log")),
        ("soft_topk_tangent", (*solved, v, None, alpha, True, "log_complement")),
        ("soft_topk_backward_of_tangent", (*solved, v, v.cos(), None, alpha, False, "p")),
        ("soft_topk_second_tangent", (*solved, v, None, None, None, k, alpha, True, "p")),
        ("hard_topk_mask", (turned, k, 0.0, True)),
        ("hard_topk_indices", (x, None, 2.0, 3, False)),
    ]


@pytest.mark.parametrize("call", range(len(operator_calls())), ids=lambda i: operator_calls()[i][0])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, device, call, requires_grad):
    name, arguments = operator_calls()[call]
    arguments = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    if requires_grad:
        if "of_tangent" in name or "second" in name:
            pytest.skip("not differentiable")
        arguments = [a.requires_grad_() if isinstance(a, Tensor) and a.is_leaf else a for a in arguments]
    opcheck(getattr(torch.ops.softtopk, name).default, (*arguments, backend))


# ---- the rest of the machinery


def test_autocast(backend, device):
    """bfloat16 in and out, k and alpha as they are, whatever autocast does to the layers around."""
    x, k, alpha = problem(device, rows=2, n=33, dtype=torch.float32)
    layer = torch.nn.Linear(33, 33, device=device)
    k = k.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        hidden = layer(x)
        p = soft_topk(hidden, k, alpha, backend=backend)
    assert p.dtype == torch.bfloat16
    assert torch.equal(p, soft_topk(hidden, k, alpha, backend=backend))
    p.float().square().sum().backward()
    assert k.grad.dtype == torch.float32 and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    arguments = leaves(*problem())
    function = functools.partial(everything, backend=None)
    want = torch.autograd.grad(function(*arguments), arguments)
    for a in arguments:
        a.grad = None
    checkpoint(function, *arguments, use_reentrant=use_reentrant).backward()
    for argument, w in zip(arguments, want, strict=True):
        assert torch.equal(argument.grad, w)


def test_saved_tensors_are_x_and_scalars_of_its_rows(form):
    """What a graph holds until its backward: x itself and a few numbers a row; hooks see all of it."""
    x, k, alpha = leaves(*problem(rows=3, n=50))
    packed = []

    def pack(t):
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = FUNCTIONS[form](x, k, alpha)
    assert sum(t.numel() for t in packed) == 3 * 50 + 3 + 3 + 3 * 5
    got = torch.autograd.grad(y.square().sum(), (x, k, alpha))
    want = torch.autograd.grad(FUNCTIONS[form](x, k, alpha).square().sum(), (x, k, alpha))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_changing_x_before_the_backward_is_an_error():
    x = torch.randn(3, 5, requires_grad=True)
    y = x * 1
    p = soft_topk(y, 2)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        p.sum().backward()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_meta_and_fake_tensors(form, dim):
    x = torch.randn(3, 4, 5)
    want = FUNCTIONS[form](x, 2, dim=dim)
    meta = FUNCTIONS[form](x.to("meta"), 2, dim=dim)
    with FakeTensorMode() as mode:
        fake = FUNCTIONS[form](mode.from_tensor(x), 2, dim=dim)
        values, indices, counts = hard_topk(mode.from_tensor(x), 2, dim=dim, return_indices=True)
    for t in (meta, fake):
        assert (t.shape, t.dtype, t.stride()) == (want.shape, want.dtype, want.stride())
    real = hard_topk(x, 2, dim=dim, return_indices=True)
    for f, r in zip((values, indices, counts), real, strict=True):
        assert (f.shape, f.dtype) == (r.shape, r.dtype)
