"""One probe for every feature of a soft top-k: a small piece of use whose result is checked.

A probe takes an implementation and a device. It returns None when the feature is there, or a line
to record instead; raises Absent where the feature is not offered and Wrong where the result is not
right. What else the implementation raises is left to pass (benchmarks/features.py records it).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import softtopk
from benchmarks.implementations import Absent, Implementation
from tests.accuracy import oracle
from tests.cases import make


class Wrong(Exception):
    """The call succeeded and its result is not right; the message says by how much."""


def draw(*shape: int, device: str, seed: int = 0) -> Tensor:
    """Float64 standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)


def check_sum(implementation: Implementation, p: Tensor, k, tolerance: float, dim: int = -1) -> None:
    if not implementation.sums_to_k:
        return
    off = (p.double().sum(dim) - k).abs().max().item()
    if not off <= tolerance:
        raise Wrong(f"sum(p) is off by {off:.2g}")


def check_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    off = (got.double() - want.double()).abs().max().item()
    if not off <= tolerance:
        raise Wrong(f"{what} is off by {off:.2g}")


def gradients(
    p: Tensor, arguments: tuple[Tensor, ...], v: Tensor, create_graph: bool = False, zero: bool = False
) -> tuple[Tensor, ...]:
    """Those of <p, v>; all of them must be there, or count as 0."""
    if not p.requires_grad:
        raise Absent("no gradient")
    found = torch.autograd.grad(p, arguments, v, create_graph=create_graph, allow_unused=True)
    if zero:
        return tuple(torch.zeros_like(a) if g is None else g for a, g in zip(arguments, found, strict=True))
    if any(g is None for g in found):
        raise Absent("no gradient")
    return found


def directional(function: Callable, at: Tensor, direction: Tensor, what: str) -> Tensor:
    """Central differences of function along a direction; wide ones for alpha, which some round to float32."""
    step = 1e-3 if "alpha" in what else 1e-5
    with torch.no_grad():
        return (function(at + step * direction) - function(at - step * direction)) / (2 * step)


def check_gradient(function: Callable, at: Tensor, what: str, zero: bool = False) -> None:
    """The gradient of <function, v> for a random v against central differences in a random direction.

    zero: a gradient that autograd knows to be none is 0.
    """
    leaf = at.clone().requires_grad_()
    value = function(leaf)
    v = draw(*value.shape, device=value.device.type, seed=1)
    direction = draw(*at.shape, device=at.device.type, seed=2)
    (gradient,) = gradients(value, (leaf,), v, zero=zero)
    want = (directional(function, at, direction, what) * v).sum().item()
    got = (gradient * direction).sum().item()
    if not abs(got - want) <= 1e-2 * abs(want) + 1e-3:
        raise Wrong(f"derivative to {what} {got:.3g}, by differences {want:.3g}")


def along_rows(implementation: Implementation, alpha: float = 0.5, k: float = 3, dim: int = -1) -> Callable:
    """x -> p on a copy of x (some change it) with one k and one alpha."""
    return lambda x: implementation.function(x.clone(), k, alpha, dim)


def several(implementation: Implementation, device: str) -> tuple[Callable, tuple[Tensor, ...]]:
    """A function of everything that should be differentiable, and a point: (x, k, alpha), or x alone."""
    x = draw(2, 9, device=device)
    if not implementation.is_lapsum:
        return lambda x: implementation.function(x.clone(), 3, 0.7, -1), (x,)
    k = torch.tensor([2.3, 3.6], dtype=torch.float64, device=device)
    alpha = torch.tensor(0.7, dtype=torch.float64, device=device)
    return lambda x, k, a: implementation.function(x.clone(), k.clone(), a * 1, -1), (x, k, alpha)


def k_per_row(implementation: Implementation, device: str) -> None:
    x = draw(4, 9, device=device)
    k = torch.tensor([1.5, 2.0, 3.25, 4.0], dtype=torch.float64, device=device)

    def function(k):
        return implementation.function(x.clone(), k, 0.5, -1)

    check_sum(implementation, function(k), k, 1e-4)
    check_gradient(function, k, "k")


def alpha_per_row(implementation: Implementation, device: str) -> None:
    x = draw(4, 9, device=device)
    alpha = torch.tensor([0.3, 0.5, 0.7, 1.0], dtype=torch.float64, device=device)

    def function(alpha):
        return implementation.function(x.clone(), 3, alpha, -1)

    check_sum(implementation, function(alpha.clone()), 3, 1e-4)
    check_gradient(lambda alpha: function(alpha * 1), alpha, "alpha")


def alpha_as_number(implementation: Implementation, device: str) -> None:
    function = implementation.number_alpha or implementation.function
    check_gradient(lambda x: function(x.clone(), 3, 0.5, -1), draw(4, 9, device=device), "x")


def alpha_computed(implementation: Implementation, device: str) -> None:
    """One alpha for all rows that is itself the result of a computation, as a learned one is."""
    x = draw(4, 9, device=device)
    logarithm = torch.tensor(-0.7, dtype=torch.float64, device=device)
    check_gradient(lambda a: implementation.function(x.clone(), 3, a.exp(), -1), logarithm, "log alpha")


def three_dimensions(implementation: Implementation, device: str) -> None:
    x = draw(2, 3, 9, device=device)
    check_sum(implementation, along_rows(implementation)(x), 3, 1e-4)
    check_gradient(along_rows(implementation), x, "x")


def any_dimension(implementation: Implementation, device: str) -> None:
    for shape, dim in (((4, 9), 1), ((9, 4), 0), ((2, 9, 3), 1), ((9, 2, 3), 0)):
        x, function = draw(*shape, device=device), along_rows(implementation, dim=dim)
        check_sum(implementation, function(x), 3, 1e-4, dim=dim)
        check_gradient(function, x, "x")


def strided(implementation: Implementation, device: str) -> None:
    base = draw(9, 4, device=device)
    leaf = base.clone().requires_grad_()
    p = implementation.function(leaf.t(), 3, 0.5, -1)
    (got,) = gradients(p, (leaf,), torch.ones_like(p) + p.detach())
    row = base.t().contiguous().requires_grad_()
    p = implementation.function(row, 3, 0.5, -1)
    (want,) = gradients(p, (row,), torch.ones_like(p) + p.detach())
    check_close(got, want.t(), 1e-6, "the gradient")


def half(dtype: torch.dtype) -> Callable:
    def probe(implementation: Implementation, device: str) -> None:
        x = make("relu", 4, 1024).to(device, dtype).requires_grad_()
        p = implementation.function(x, 32, 0.1, -1)
        if p.dtype != dtype:
            raise Wrong(f"p is {p.dtype}")
        check_sum(
            implementation, p.detach(), 32, 32 * torch.finfo(dtype).eps
        )  # what rounding every p may add
        (gradient,) = gradients(p, (x,), torch.ones_like(p))
        if not gradient.isfinite().all():
            raise Wrong("a gradient is not finite")

    return probe


def whole_k_at_small_alpha(implementation: Implementation, device: str) -> None:
    """The gradient to k in the gap between two elements, by the bar of tests/accuracy.py."""
    x = make("relu", 64, 4096)
    k = torch.full((64,), 32.0)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    leaf = k.to(device).requires_grad_()
    alpha = torch.tensor(1e-4).item()
    p = implementation.function(x.to(device), leaf, alpha, -1)
    (got,) = gradients(p, (leaf,), v.to(device))
    if not implementation.is_lapsum:
        raise Absent("another operator")
    got = got.double().cpu()
    wrong = ~((got - oracle(x, k, alpha, v).grad_k).abs() <= 1e-5 * v.abs().amax(1))
    if wrong.any():
        counts = f"0 in {int((got == 0).sum())}, not finite in {int((~got.isfinite()).sum())}"
        raise Wrong(f"in {int(wrong.sum())} of 64 rows ({counts})")


def double_backward(implementation: Implementation, device: str) -> None:
    """The gradients of a first gradient, to all that it depends on and to the incoming gradient v."""
    function, point = several(implementation, device)
    point += (draw(2, 9, device=device, seed=3),)

    def first(*arguments):
        *leaves, v = (a if a.requires_grad else a.clone().requires_grad_() for a in arguments)
        with torch.enable_grad():
            found = gradients(function(*leaves), tuple(leaves), v, create_graph=True)
            return torch.cat([g.flatten() for g in found])

    names = (("x", "k", "alpha") if implementation.is_lapsum else ("x",)) + ("v",)
    for i, name in enumerate(names):
        check_gradient(lambda t, i=i: first(*point[:i], t, *point[i + 1 :]), point[i], name, zero=True)


def forward_mode(implementation: Implementation, device: str) -> None:
    function, point = several(implementation, device)
    for i, name in enumerate(("x", "k", "alpha")[: len(point)]):

        def of_one(t, i=i):
            return function(*point[:i], t, *point[i + 1 :])

        direction = draw(*point[i].shape, device=device, seed=2)
        _, got = torch.func.jvp(of_one, (point[i],), (direction,))
        check_close(got, directional(of_one, point[i], direction, name), 1e-3, f"the derivative to {name}")


def vmap(implementation: Implementation, device: str) -> None:
    x = draw(3, 4, 9, device=device)
    if implementation.is_lapsum:
        k = draw(3, 4, device=device, seed=1).abs() + 1

        def function(x, k):
            return implementation.function(x.clone(), k, 0.5, -1)

        arguments: tuple[Tensor, ...] = (x, k)
    else:
        function, arguments = along_rows(implementation), (x,)
    want = torch.stack([function(*one) for one in zip(*arguments, strict=True)])
    check_close(torch.func.vmap(function)(*arguments), want, 1e-6, "p")


def compiled(implementation: Implementation, device: str) -> None:
    """torch.compile(fullgraph=True), traced and differentiated; the kernels are not generated."""
    torch._dynamo.reset()
    function = along_rows(implementation)
    x = draw(4, 9, device=device)
    want = function(x)
    leaf = x.clone().requires_grad_()
    p = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    check_close(p.detach(), want, 1e-6, "p")
    gradients(p, (leaf,), torch.ones_like(p))


def deterministic(implementation: Implementation, device: str) -> None:
    def once():
        x = make("normal", 16, 1024).to(device).requires_grad_()
        if not implementation.is_lapsum:
            p = implementation.function(x, 32, 0.1, -1)
            return p, *gradients(p, (x,), torch.cos(torch.arange(p.numel(), device=device)).view_as(p))
        k = torch.full((16,), 32.5, device=device, requires_grad=True)
        alpha = torch.tensor(0.1, device=device, requires_grad=True)
        p = implementation.function(x, k, alpha * 1, -1)
        return p, *gradients(p, (x, k, alpha), torch.cos(torch.arange(p.numel(), device=device)).view_as(p))

    first = once()
    for _ in range(5):
        if not all(torch.equal(a, b) for a, b in zip(first, once(), strict=True)):
            raise Wrong("results differ from run to run")


def many_rows(implementation: Implementation, device: str) -> None:
    x = make("normal", 70_000, 4).to(device).requires_grad_()
    p = implementation.function(x, 2, 0.3, -1)
    (gradient,) = gradients(p, (x,), p.detach())
    last = x.detach()[-1:].clone().requires_grad_()
    alone = implementation.function(last, 2, 0.3, -1)
    check_close(p[-1:], alone, 1e-5, "the last row")
    check_close(gradient[-1:], gradients(alone, (last,), alone.detach())[0], 1e-5, "its gradient")


def logarithm(complement: bool) -> Callable:
    """log p or log(1 - p) of float32 rows down to where p itself is 0, to 1e-5 of its value; gradients."""

    def probe(implementation: Implementation, device: str) -> None:
        if implementation.log is None:
            raise Absent("no log p")
        x, k, alpha = make("normal", 2, 4096), torch.tensor([32.0, 32.5]), torch.tensor(1e-2).item()
        got = implementation.log(x.to(device), k.to(device), alpha, complement).double().cpu()
        _, b = softtopk.soft_topk(x.double(), k, alpha, return_threshold=True, backend="reference")
        t = (x.double() - b.unsqueeze(1)) / alpha * (-1 if complement else 1)
        want = torch.where(t <= 0, t - torch.tensor(2.0).log(), torch.log1p(-0.5 * torch.exp(-t.abs())))
        if not got.isfinite().all():
            raise Wrong(f"{(~got.isfinite()).double().mean().item():.0%} of the values are not finite")
        error = torch.where(want.abs() >= 1e-20, (got - want).abs() / want.abs(), 0).flatten()
        at = error.argmax()
        if not error[at] <= 1e-5:
            raise Wrong(f"relative error {error[at]:.2g} at {want.flatten()[at]:.2g}")
        x, k = draw(2, 9, device=device), torch.tensor([2.3, 3.6], dtype=torch.float64, device=device)
        check_gradient(lambda x: implementation.log(x.clone(), k, 0.5, complement), x, "x")
        check_gradient(lambda k: implementation.log(x.clone(), k, 0.5, complement), k, "k")

    return probe


def without_cuda(implementation: Implementation, device: str) -> str | None:
    if implementation.import_error is not None:
        raise implementation.import_error
    return None if device == "cpu" else "not tried: there is a GPU"


def arguments_unchanged(implementation: Implementation, device: str) -> None:
    function, point = several(implementation, device)
    leaves = [t.clone().requires_grad_() for t in point]
    p = implementation.function(leaves[0], *(leaves[1:] or (3, 0.7)), -1)
    gradients(p, (leaves[0],), torch.cos(p.detach()))
    for name, leaf, before in zip(("x", "k", "alpha"), leaves, point, strict=False):
        if not torch.equal(leaf.detach(), before):
            raise Wrong(f"{name} is changed")


def custom_stream(implementation: Implementation, device: str) -> str | None:
    """x is produced late on a side stream, where the call is made too."""
    if device == "cpu":
        return "not tried: no GPU"
    x, want = draw(4, 1024, device=device), draw(4, 1024, device=device, seed=1)
    expected = implementation.function(want.clone(), 32, 0.5, -1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(want)
        p = implementation.function(x, 32, 0.5, -1)
    stream.synchronize()
    torch.cuda.synchronize()
    check_close(p, expected, 1e-6, "p")
    return None


def cuda_graph(implementation: Implementation, device: str) -> str | None:
    if device == "cpu":
        return "not tried: no GPU"
    x, other = draw(4, 1024, device=device), draw(4, 1024, device=device, seed=1)
    expected = implementation.function(other.clone(), 32, 0.5, -1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        implementation.function(x, 32, 0.5, -1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p = implementation.function(x, 32, 0.5, -1)
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    check_close(p, expected, 1e-6, "p")
    return None


def peak_memory(implementation: Implementation, device: str) -> str:
    """Of forward and backward, beyond x and the incoming gradient, in sizes of x; p and grad_x are 2."""

    def both(rows: int) -> None:
        p = implementation.function(x[:rows].detach().requires_grad_(), 32, 0.1, -1)
        p.backward(v[:rows])

    x = make("normal", 256, 16384).to(device)
    v = torch.ones_like(x)
    both(1)
    if device == "cpu":
        before = status_bytes("VmRSS")
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # the peak starts anew from here
        both(len(x))
        peak = status_bytes("VmHWM") - before
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both(len(x))
        peak = torch.cuda.max_memory_allocated() - before
    return f"{peak / (x.numel() * x.element_size()):.0f}"


def status_bytes(field: str) -> int:
    """A line of Linux's status of this process."""
    try:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))
    except OSError:
        raise Absent("not measured on this system") from None


FEATURES: dict[str, Callable[[Implementation, str], str | None]] = {
    "k per row, with gradient": k_per_row,
    "alpha per row, with gradient": alpha_per_row,
    "gradient to a computed alpha": alpha_computed,
    "alpha as a number, backward": alpha_as_number,
    "3-D input, backward": three_dimensions,
    "any dim, backward": any_dimension,
    "strided input, backward": strided,
    "bfloat16": half(torch.bfloat16),
    "float16": half(torch.float16),
    "gradient to a whole k at alpha = 1e-4": whole_k_at_small_alpha,
    "double backward": double_backward,
    "forward mode": forward_mode,
    "vmap": vmap,
    "torch.compile(fullgraph=True)": compiled,
    "same bits from run to run": deterministic,
    "70,000 rows": many_rows,
    "log p to 1e-5 of its value": logarithm(complement=False),
    "log(1 - p) to 1e-5 of its value": logarithm(complement=True),
    "arguments left unchanged": arguments_unchanged,
    "imported without CUDA": without_cuda,
    "peak memory, in sizes of x": peak_memory,
    "custom stream": custom_stream,
    "CUDA graph": cuda_graph,  # last: a capture that fails may leave the process unusable
}
