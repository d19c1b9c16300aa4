"""The short way past the dispatcher (softtopk/direct.py): the same bits and errors as the operators, and
taken only where nothing else would have seen the operator."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from softtopk import direct, hard_topk, log_soft_topk, soft_topk
from tests.softtopk.test_errors import WRONG


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if direct.default(request.param) is None or (request.param == "cuda" and not torch.cuda.is_available()):
        pytest.skip(f"no native backend for {request.param}")
    return request.param


class Plain(Tensor):
    """A subclass that changes nothing."""


def x_of(rows: int = 3, n: int = 7) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(0))


def by_operator(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(direct, "alone", lambda: False)
        patch.setattr(direct, "soft_topk", lambda *arguments: None)
        return call()


def tensors(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


CALLS = {
    "p": lambda x, k, alpha: soft_topk(x, k, alpha),
    "smallest": lambda x, k, alpha: soft_topk(x, k, alpha, largest=False),
    "threshold": lambda x, k, alpha: soft_topk(x, k, alpha, return_threshold=True),
    "hard=True": lambda x, k, alpha: soft_topk(x, k, alpha, hard=True),
    "hard=True, threshold": lambda x, k, alpha: soft_topk(x, k, alpha, hard=True, return_threshold=True),
    "log": lambda x, k, alpha: log_soft_topk(x, k, alpha),
    "log_complement": lambda x, k, alpha: log_soft_topk(x, k, alpha, complement=True),
    "mask": lambda x, k, alpha: hard_topk(x, k),
    "indices": lambda x, k, alpha: hard_topk(x, k, max_k=4, return_indices=True),
}
EVERY_SECOND = torch.tensor([3.0, 9.0, 1.5, 9.0, 4.0, 9.0])[::2]
ARGUMENTS = {  # the shape of x, k and alpha
    "numbers": ((3, 7), 2, 0.1),
    "float": ((3, 7), 2.5, 1),
    "one row": ((7,), 2.5, 0.1),
    "no row": ((2, 0, 7), 2.5, 0.1),
    "no row, tensors": ((0, 7), torch.empty(0), torch.tensor(0.1)),
    "one element": ((1,), 0.5, 0.1),
    "four dimensions": ((2, 1, 3, 7), 2.5, 0.1),
    "a value per row": ((3, 7), torch.tensor([1.0, 2.5, 6.0]), torch.tensor([0.1, 1.0, 3.0])),
    "float64 and one for all": ((3, 7), torch.tensor(2.5).double(), torch.tensor(0.3)),
    "of no dimension, one row": ((7,), torch.tensor(2.5), torch.tensor(0.3)),
    "every second": ((3, 7), EVERY_SECOND, EVERY_SECOND / 10),
    "expanded": ((3, 7), torch.tensor([2.5]).expand(3), torch.tensor([0.2]).expand(3)),
    "two dimensions": ((2, 3, 7), torch.arange(1.0, 7).view(2, 3), torch.tensor(0.3)),
    "two dimensions, turned": ((2, 3, 7), torch.arange(1.0, 7).view(3, 2).t(), 0.3),
    "a stride of no meaning": ((3, 1, 7), torch.arange(1.0, 22).view(3, 7)[:, :1].clone().t().t(), 0.3),
    "integers and halves": ((3, 7), torch.tensor([1, 2, 6]), torch.tensor([0.1, 1.0, 3.0]).half()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_same_bits_as_the_operator(device, operators, monkeypatch, call, arguments, dtype):
    shape, *values = arguments
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    k, alpha = (v.to(device) if isinstance(v, Tensor) else v for v in values)
    if isinstance(k, int | float) and k > x.shape[-1]:
        pytest.skip("k is out of range")
    with torch.no_grad():
        got = call(x, k, alpha)
        strange = isinstance(k, Tensor) and not direct.strides_fit(k.expand(shape[:-1]))
        assert strange or not operators
        want = by_operator(monkeypatch, lambda: call(x, k, alpha))
        assert operators
    for g, w in zip(tensors(got), tensors(want), strict=True):
        assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())
        assert torch.equal(g, w) and not g.requires_grad


def as_they_lie(device: str, dtype: torch.dtype = torch.float32):
    """Calls that nothing has to be done for but the kernel's work."""
    x, leaf = x_of().to(device, dtype), x_of().to(device, dtype).requires_grad_()
    row = torch.tensor([1.0, 2.5, 9.0], device=device)
    learned = torch.nn.Parameter(row)
    yield lambda: soft_topk(x, 2)
    yield lambda: soft_topk(x, 2.5, 1, largest=False)
    yield lambda: soft_topk(x, k=0, alpha=1e-3, dim=1)
    yield lambda: soft_topk(x[1], 7, dim=0)
    yield lambda: soft_topk(x[:0], 2)
    yield lambda: soft_topk(x.view(3, 1, 1, 7), 2)
    yield lambda: soft_topk(x[1:], 2, backend=None, hard=False, return_threshold=False)
    yield lambda: soft_topk(x, row)
    yield lambda: soft_topk(x, row.double(), row[2])
    yield lambda: soft_topk(x[2], row[2], 1)
    yield lambda: soft_topk(x, 2, -row)
    yield lambda: soft_topk(x.view(3, 1, 7), row.view(3, 1), alpha=row.view(3, 1).double())
    yield lambda: soft_topk(leaf.detach(), 2)
    yield torch.no_grad()(lambda: soft_topk(x, learned, learned))
    yield torch.no_grad()(lambda: soft_topk(leaf, 2))
    yield torch.no_grad()(lambda: soft_topk(torch.nn.Parameter(x), 2))
    yield torch.inference_mode()(lambda: soft_topk(x, 2))
    yield torch.autocast(device, dtype=torch.bfloat16)(lambda: soft_topk(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_plain_call_is_done_at_once(device, operators, at_once, monkeypatch, dtype):
    for call in as_they_lie(device, dtype):
        at_once.clear()
        got = call()
        assert at_once == [True] and not operators
        want = by_operator(monkeypatch, call)
        assert operators.pop() == "soft_topk_op" and not operators
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, check_stride=True)
        assert type(got) is Tensor and not got.requires_grad and got.is_inference() == want.is_inference()


def not_at_once(device: str):
    """Calls for which there is more to do, or that have to raise."""
    x, leaf = x_of().to(device), x_of().to(device).requires_grad_()
    row, none = torch.tensor([1.0, 2.0, 3.0], device=device), x[:, :0]
    strided = torch.arange(1.0, 7.0, device=device)[::2]
    unlike = row.int(), row.half(), row.bool(), row[:2], row[:1], row[None], row.expand(2, 3), strided
    yield from (lambda k=k: soft_topk(x, k) for k in (*unlike, row.to("meta"), row.as_subclass(Plain)))
    yield from (lambda a=a: soft_topk(x, 2, a) for a in (*unlike, row.clone().requires_grad_(), [2.0]))
    yield from (lambda k=k: soft_topk(x, k) for k in (np.float64(2), np.int64(2), Fraction(5, 2)))
    yield from (lambda k=k: soft_topk(x, k) for k in (-1, 8, math.nan, math.inf, 10**400, True, "2", None))
    yield from (lambda a=a: soft_topk(x, 2, a) for a in (0, -1, math.nan, math.inf, 10**400, True, None))
    yield from (lambda d=d: soft_topk(x, 2, dim=d) for d in (0, -2, 2, -3, True, -1.0, 10**400, None))
    yield from (lambda t=t: soft_topk(t, 2) for t in (leaf, x.t(), x[:, ::2], x.sum(), none, x.int(), x > 0))
    yield from (lambda t=t: soft_topk(t, 0) for t in (none, x.sum(), None, [1.0], x.to_sparse(), x + 0j))
    yield lambda: soft_topk(x, 2, hard=True)
    yield lambda: soft_topk(x, 2, return_threshold=True)
    yield lambda: soft_topk(x, 2, backend=device)
    yield lambda: soft_topk(x, 2, largest=1)


def test_other_calls_are_not_done_at_once(device, operators, at_once, monkeypatch):
    def outcome(call):
        try:
            return call()
        except Exception as error:
            return type(error), str(error)

    for call in not_at_once(device):
        got = outcome(call)
        assert True not in at_once
        want = outcome(lambda call=call: by_operator(monkeypatch, call))
        if isinstance(got, Tensor):
            assert type(got) is type(want) and torch.equal(got, want)
        else:  # an error, or p and the threshold
            assert str(got) == str(want)
    assert len(at_once) > 50  # the others did not ask


def test_nothing_is_done_at_once_where_there_is_no_native_backend(operators, at_once, monkeypatch):
    direct.default.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(direct.dispatch, "default", lambda device_type: "reference")
        p = soft_topk(x_of(), 2.5)
    direct.default.cache_clear()
    assert at_once == [False] and operators == ["soft_topk_op"]
    assert torch.equal(p, soft_topk(x_of(), 2.5, backend="reference"))


@pytest.mark.parametrize("name", ["p", "threshold", "hard=True", "log", "log_complement"])
@pytest.mark.parametrize("which", [(True, True, True), (True, False, False), (False, True, True)])
def test_the_same_gradients_as_the_operator(device, operators, monkeypatch, name, which):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, generator=g).to(device)
    k = (1 + 6 * torch.rand(2, 3, generator=g)).to(device)
    alpha = torch.tensor(0.3, device=device, dtype=torch.float64)
    v = torch.randn(2, 3, 9, generator=g).to(device)
    arguments = [t.requires_grad_(needed) for t, needed in zip((x, k, alpha), which, strict=True)]
    wanted = [t for t in arguments if t.requires_grad]

    def run():
        y = tensors(CALLS[name](*arguments))[0]
        return y.detach(), *torch.autograd.grad(y, wanted, v)

    got = run()
    assert not operators
    want = by_operator(monkeypatch, run)
    assert operators == ["soft_topk_op", "backward_op"]
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_second_derivative_goes_through_the_operator(device, operators):
    x = torch.randn(2, 9, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(soft_topk(x, 2.5).square().sum(), x, create_graph=True)
    assert operators == ["backward_op"]
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().sum() > 0


def test_many_gradients_at_once_go_through_the_operator(operators):
    x = torch.randn(9, requires_grad=True)
    p = soft_topk(x, 2.5)
    (rows,) = torch.autograd.grad(p, x, torch.eye(9), is_grads_batched=True, retain_graph=True)
    assert operators == ["backward_op"]
    for i, row in enumerate(torch.eye(9)):
        assert torch.equal(rows[i], torch.autograd.grad(p, x, row, retain_graph=True)[0])


@pytest.mark.parametrize("call,error", [w[:2] for w in WRONG], ids=[str(i) for i in range(len(WRONG))])
def test_the_same_errors_as_the_operator(monkeypatch, call, error):
    messages = []
    for way in (lambda: call(), lambda: by_operator(monkeypatch, call)):
        with pytest.raises(error) as raised:
            way()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_the_environment_is_read_at_every_call(operators, at_once, monkeypatch):
    monkeypatch.setenv("SOFTTOPK_BACKEND", "reference")
    by_reference = soft_topk(x_of(), 2.5)
    assert operators == ["soft_topk_op"]
    assert torch.equal(by_reference, soft_topk(x_of(), 2.5, backend="reference"))
    monkeypatch.setenv("SOFTTOPK_BACKEND", "cpu")
    soft_topk(x_of(), 2.5)
    monkeypatch.delenv("SOFTTOPK_BACKEND")
    soft_topk(x_of(), 2.5)
    assert operators == ["soft_topk_op"] * 2
    assert at_once == [False, False, True]


def steps(call) -> int:
    """Calls of Python and C functions that a warm call makes."""
    call()
    count = 0

    def step(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(step)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def test_a_small_call_takes_few_steps(device, monkeypatch):
    """The host's time for a small call is that of its steps: about 0.1 us each."""
    x, leaf = x_of().to(device), x_of().to(device).requires_grad_()
    with torch.no_grad():
        assert steps(lambda: soft_topk(x, 2)) <= 6
        assert steps(lambda: hard_topk(x, 2)) <= 45
        assert by_operator(monkeypatch, lambda: steps(lambda: soft_topk(x, 2))) > 60  # it can be told
    assert steps(lambda: soft_topk(leaf, 2)) <= 85
