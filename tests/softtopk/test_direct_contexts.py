"""The short way past the dispatcher (softtopk/direct.py) is left to whatever would have seen the operator:
modes, transforms, compilers, subclasses, profilers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from softtopk import SoftTopK, soft_topk
from tests.softtopk.test_direct import Plain, x_of


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Overrides(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


CONSTANT = x_of()


def inside(context, x: Tensor | None = None):
    x = x_of() if x is None else x
    with context:
        return soft_topk(x, 2.5)


def dual():
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(soft_topk(forward_ad.make_dual(x_of(), torch.ones(3, 7)), 2.5)).tangent


def in_dual_level():
    with forward_ad.dual_level():
        return soft_topk(x_of(), 2.5)


def fake():
    with FakeTensorMode() as mode:
        return soft_topk(mode.from_tensor(x_of()), 2.5)


def profiled():
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        soft_topk(x_of(), 2.5)
    assert "softtopk::soft_topk" in {event.key for event in seen.key_averages()}


def traced():
    with contextlib.suppress(DeprecationWarning):
        module = torch.jit.trace(lambda x: soft_topk(x, 2.5), (x_of(),), check_trace=False)
    assert "softtopk::soft_topk" in str(module.graph)


def made_fx(**options):
    graph = make_fx(lambda x: soft_topk(x, 2.5), **options)(x_of())
    assert "softtopk.soft_topk" in graph.code


def zero_tensor():
    return soft_topk(torch._efficientzerotensor((3, 7)), 2.5)


def functional_tensor():
    """A wrapper of the type torch.Tensor without memory of its own."""
    x = torch._to_functional_tensor(x_of())
    torch._enable_functionalization(reapply_views=True)
    try:
        return torch._from_functional_tensor(soft_topk(x, 2.5))
    finally:
        torch._disable_functionalization()


def leaked_wrapper():
    """A tensor that is used after the transform that it belongs to."""
    kept = []
    grad(lambda x: (kept.append(x), x.sum())[1])(x_of())
    return soft_topk(kept[0], 2.5)


CONTEXTS = {
    "vmap": lambda: vmap(lambda x: soft_topk(x, 2.5))(x_of()),
    "a constant in vmap": lambda: vmap(lambda y: y + soft_topk(CONSTANT, 2.5))(torch.zeros(2)),
    "grad": lambda: grad(lambda x: soft_topk(x, 2.5).square().sum())(x_of()),
    "jvp": lambda: jvp(lambda x: soft_topk(x, 2.5), (x_of(),), (x_of(),)),
    "functionalize": lambda: functionalize(lambda x: soft_topk(x, 2.5))(x_of()),
    "functional_call": lambda: vmap(lambda x: functional_call(SoftTopK(2.5), {}, x))(x_of()),
    "dual numbers": dual,
    "a dual level": in_dual_level,
    "FakeTensorMode": fake,
    "FakeTensorMode, real x": lambda: inside(FakeTensorMode(allow_non_fake_inputs=True)),
    "TorchDispatchMode": lambda: inside(Count()),
    "TorchFunctionMode": lambda: inside(Overrides()),
    "default device": lambda: inside(torch.device("cpu")),
    "profiler": profiled,
    "legacy profiler": lambda: inside(torch.autograd.profiler.profile()),
    "jit.trace": traced,
    "make_fx": made_fx,
    "make_fx, fake": lambda: made_fx(tracing_mode="fake"),
    "make_fx, pre-dispatch": lambda: made_fx(pre_dispatch=True),
    "subclass": lambda: soft_topk(x_of().as_subclass(Plain), 2.5),
    "subclass as k": lambda: soft_topk(x_of(), torch.ones(3).as_subclass(Plain)),
    "meta": lambda: soft_topk(x_of().to("meta"), 2.5),
    "a sign that is only noted": lambda: soft_topk(torch.view_as_complex(torch.ones(3, 7, 2)).conj().imag, 2),
    "the same in k": lambda: soft_topk(x_of(), torch._neg_view(torch.tensor([-1.0, -2.0, -3.0]))),
    "zero tensor": zero_tensor,
    "functional tensor": functional_tensor,
    "leaked wrapper": leaked_wrapper,
    "turned": lambda: soft_topk(x_of().t(), 2.5),
    "strided": lambda: soft_topk(x_of()[:, ::2], 2.5),
    "another backend": lambda: soft_topk(x_of(), 2.5, backend="reference"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("run", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("tape", [True, False])
def test_what_composes_goes_through_the_operator(operators, at_once, run, tape):
    with torch.set_grad_enabled(tape):
        run()
    assert "soft_topk_op" in operators and True not in at_once


def test_modes_see_the_operator():
    for mode, name in ((Count(), "softtopk.soft_topk.default"), (Overrides(), "softtopk.soft_topk")):
        p = inside(mode)
        assert any(name in seen for seen in mode.seen)
        assert torch.equal(p, soft_topk(x_of(), 2.5))


def test_wrappers_give_the_values_that_they_stand_for():
    x = torch._neg_view(x_of())
    assert x.is_neg() and torch.equal(soft_topk(x, 2.5), soft_topk(-x_of(), 2.5))
    assert torch.equal(soft_topk(x_of(), torch._neg_view(torch.full((3,), -2.5))), soft_topk(x_of(), 2.5))
    assert torch.equal(leaked_wrapper(), soft_topk(x_of(), 2.5))
    assert torch.equal(functional_tensor(), soft_topk(x_of(), 2.5))
    assert torch.equal(zero_tensor(), soft_topk(torch.zeros(3, 7), 2.5))
    x = torch.zeros(3, 7, requires_grad=True)  # a gradient that is only noted to be 0
    p = soft_topk(x, 2.5)
    assert not torch.autograd.grad(p, x, torch._efficientzerotensor((3, 7)))[0].any()
    v = x_of()
    want = torch.autograd.grad(soft_topk(x, 2.5), x, -v)
    assert torch.equal(torch.autograd.grad(soft_topk(x, 2.5), x, torch._neg_view(v))[0], want[0])


@pytest.mark.parametrize("tape", [True, False])
def test_compile_and_export_see_the_operator(tape):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: soft_topk(x, 2.5), fullgraph=True, backend=backend)
    with torch.set_grad_enabled(tape):
        assert torch.equal(compiled(x_of()), soft_topk(x_of(), 2.5))
    for strict in (True, False):
        graphs.append(torch.export.export(SoftTopK(2.5), (x_of(),), strict=strict).graph_module)
    assert len(graphs) == 3 and all("softtopk.soft_topk" in graph.code for graph in graphs)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_what_an_operator_would_not_notice_is_direct(operators, context):
    want = soft_topk(x_of(), 2.5)
    with context():
        p = soft_topk(x_of(), 2.5)
        assert p.is_inference() == torch.is_inference_mode_enabled()
        again = soft_topk(torch.nn.Parameter(x_of(), requires_grad=False), 2.5)
    assert torch.equal(p, want) and torch.equal(again, want) and not operators
    with torch.no_grad():
        learned = torch.nn.Parameter(x_of())
        assert torch.equal(soft_topk(learned, 2.5), want) and not operators


def test_saved_tensors_hooks_may_return_anything(operators):
    x = x_of().requires_grad_()
    want = torch.autograd.grad(soft_topk(x, 2.5), x, x_of())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.as_subclass(Plain)):
        p = soft_topk(x, 2.5)
    got = torch.autograd.grad(p, x, x_of())
    assert torch.equal(got[0], want[0]) and operators == ["backward_op"]
