"""The registered operators, softtopk::*, and their autograd.

The public functions of functional.py bring any call to the form of these schemas: x (..., n) of any
rank and strides with the selection along its last dimension; k and alpha tensors of x's shape
without it or, when the tensor is None, the number beside it. Each operator has a kernel for every
device, a fake kernel, a vmap rule and an autograd rule with reverse and forward mode; those of
first derivatives can be differentiated once more.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import Function

from softtopk import derivatives, direct, dispatch
from softtopk.backends.reference import compute_dtype
from softtopk.derivatives import Direction
from softtopk.layout import by_rows

library = torch.library.Library("softtopk", "DEF")
PER_ROW = "Tensor? k, float k_number, Tensor? alpha, float alpha_number"
SOLVED = "Tensor x, Tensor? k, Tensor? alpha, float alpha_number, Tensor solution"
DIRECTION = "Tensor? x_dot, Tensor? k_dot, Tensor? alpha_dot"


class Rule(Function):
    """The autograd rule of an operator: (operator, *arguments) -> its results."""

    @staticmethod
    def forward(operator, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            if torch._C._are_functorch_transforms_active():
                with outer_levels():
                    return operator(*arguments)
            return operator(*arguments)

    @classmethod
    def apply(cls, *arguments):
        """Function.apply at the level of torch.func that the dispatcher is at: the operators bring the
        other levels, and the rule for vmap, along."""
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return super(Function, cls).apply(*arguments)
        return super(Function, cls).apply(*arguments)


def requires_grad(argument) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


@contextlib.contextmanager
def outer_levels():
    """Autograd for the levels of torch.func outside the current one: a Function switches it off for all."""
    if torch._C._are_functorch_transforms_active():
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            yield
    else:
        yield


class NoGradient(Rule):
    """Results that are constants for autograd: masks, indices."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
        ctx.inputs, ctx.outputs = len(inputs), len(output) if isinstance(output, tuple) else 1

    @staticmethod
    def backward(ctx, *gradients):
        return (None,) * ctx.inputs

    @staticmethod
    def jvp(ctx, *tangents):
        return (None,) * ctx.outputs if ctx.outputs > 1 else None


class TwiceOnly(Rule):
    """A second derivative, which cannot be differentiated again."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("softtopk: soft_topk and log_soft_topk have no third derivatives")

    jvp = backward


class SoftTopK(Rule):
    """(x, k, alpha) -> (y, solution). With form "hard" the derivatives are those of p (straight-through)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, k, _, alpha, ctx.alpha_number, largest, form, backend = inputs
        _, solution = output
        keep(ctx, x, k, alpha, solution)
        ctx.options = (largest, "p" if form == "hard" else form, backend)
        ctx.mark_non_differentiable(solution)

    @staticmethod
    def backward(ctx, v, _):
        if v is None:
            return (None,) * 9
        x, k, alpha, solution = ctx.saved_tensors
        to_x, to_k, to_alpha = backward(x, k, alpha, ctx.alpha_number, solution, v, *ctx.options)
        return None, to_x, given(k, to_k), None, given(alpha, to_alpha), None, None, None, None

    @staticmethod
    def jvp(ctx, _, x_dot, k_dot, _k, alpha_dot, *_rest):
        x, k, alpha, solution = primals(ctx)
        direction = (x_dot, k_dot, alpha_dot)
        with outer_levels():
            return tangent_op(x, k, alpha, ctx.alpha_number, solution, *direction, *ctx.options), None


class DirectSoftTopK(SoftTopK):
    """With a native backend's kernels in the operator's place."""

    @staticmethod
    def forward(kernels, *arguments):
        return solve(kernels, *arguments)


class SoftTopKBackward(Rule):
    """(x, k, alpha, solution, v) -> gradients of <v, y>. The solution is a function of the others."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, k, alpha, ctx.alpha_number, solution, v, *ctx.options = inputs
        keep(ctx, x, k, alpha, solution, v)

    @staticmethod
    def backward(ctx, x_dot, k_dot, alpha_dot):
        x, k, alpha, solution, v = ctx.saved_tensors
        direction = (x_dot, given(k, k_dot), given(alpha, alpha_dot))
        solved = (x, k, alpha, ctx.alpha_number, solution)
        to_x, to_k, to_alpha = backward_of_tangent_op(*solved, v, *direction, *ctx.options)
        to_v = tangent_op(*solved, *direction, *ctx.options)
        return None, to_x, given(k, to_k), given(alpha, to_alpha), None, None, to_v, None, None, None

    @staticmethod
    def jvp(ctx, _, x_dot, k_dot, alpha_dot, _a, _solution_dot, v_dot, *_rest):
        x, k, alpha, solution, v = primals(ctx)
        solved = (x, k, alpha, ctx.alpha_number, solution)
        with outer_levels():
            along = backward_of_tangent_op(*solved, v, x_dot, k_dot, alpha_dot, *ctx.options)
            if v_dot is None:
                return along
            of_v = backward_op(*solved, v_dot, *ctx.options)
            return tuple(a + b for a, b in zip(along, of_v, strict=True))


class SoftTopKTangent(Rule):
    """(x, k, alpha, solution, direction) -> the derivative of y along the direction."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, k, alpha, ctx.alpha_number, solution, x_dot, k_dot, alpha_dot, *ctx.options = inputs
        keep(ctx, x, k, alpha, solution, x_dot, k_dot, alpha_dot)

    @staticmethod
    def backward(ctx, v):
        if v is None:
            return (None,) * 12
        x, k, alpha, solution, *direction = ctx.saved_tensors
        solved = (x, k, alpha, ctx.alpha_number, solution)
        to_x, to_k, to_alpha = backward_of_tangent_op(*solved, v, *direction, *ctx.options)
        of_dots = backward_op(*solved, v, *ctx.options)
        to_dots = (given(d, g) for d, g in zip(direction, of_dots, strict=True))
        return None, to_x, given(k, to_k), given(alpha, to_alpha), None, None, *to_dots, None, None, None

    @staticmethod
    def jvp(ctx, _, x_dot, k_dot, alpha_dot, _a, _s, *rest):
        x, k, alpha, solution, *direction = primals(ctx)
        solved = (x, k, alpha, ctx.alpha_number, solution)
        direction_dot = rest[:3]
        with outer_levels():
            bent = second_tangent_op(*solved, *direction, x_dot, k_dot, alpha_dot, *ctx.options)
            if all(d is None for d in direction_dot):
                return bent
            return bent + tangent_op(*solved, *direction_dot, *ctx.options)


def keep(ctx, *tensors: Tensor | None):
    """Save for the modes that there are; absent gradients and tangents stay None."""
    ctx.save_for_backward(*tensors)
    if in_forward_mode():
        ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def vmap_rule(operator):
    """Every tensor of these operators has the batch dimensions first: the mapped one becomes another."""

    def rule(info, in_dims, *arguments):
        batched = []
        for argument, dim in zip(arguments, in_dims, strict=True):
            if isinstance(argument, Tensor):
                if dim is None:
                    argument = argument.expand(info.batch_size, *argument.shape)
                else:
                    argument = argument.movedim(dim, 0)
            batched.append(argument)
        results = operator(*batched)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    return rule


def register(schema: str, fake=None, autograd: type[Rule] = NoGradient):
    """Register a function as softtopk::NAME for every device; returns the operator.

    Without `fake` the function itself runs on fake tensors.
    """
    name = schema.split("(")[0]
    library.define(schema)

    def decorate(function):
        library.impl(name, function, "CompositeExplicitAutograd")
        operator = getattr(torch.ops.softtopk, name).default
        torch.library.register_fake(f"softtopk::{name}", fake or function, lib=library)
        torch.library.register_vmap(f"softtopk::{name}", vmap_rule(operator), lib=library)

        def with_autograd(*arguments):
            if in_forward_mode() or (torch.is_grad_enabled() and any(map(requires_grad, arguments))):
                return autograd.apply(operator, *arguments)
            return Rule.forward(operator, *arguments)

        library.impl(name, with_autograd, "Autograd")
        return operator

    return decorate


def primals(ctx) -> list[Tensor | None]:
    """The saved tensors without their own tangents, which a rule for forward mode has as arguments."""
    return [None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors]


def given(argument: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The gradient where the argument was a tensor, in its dtype."""
    if argument is None or gradient is None or gradient.dtype == argument.dtype:
        return None if argument is None else gradient
    return gradient.to(argument.dtype)


def solve(kernels, x, k, k_number, alpha, alpha_number, largest, form, _backend=None):
    """y and the solution, by a backend's kernels."""
    k, alpha = either(k, k_number), either(alpha, alpha_number)
    if form != "hard":
        return kernels.soft_topk_forward(x, k, alpha, largest, form)
    _, solution = kernels.soft_topk_forward(x, k, alpha, largest, "none")
    return kernels.hard_topk_mask(x, k, largest), solution


def backward(x, k, alpha, alpha_number, solution, v, largest, form, backend):
    """backward_op, past the dispatcher where direct.py allows it."""
    if not torch.is_grad_enabled():
        scale = either(alpha, alpha_number)
        kernels = direct.kernels(backend, x, scale)
        if kernels is not None and direct.plain(solution) and direct.plain(v) and v.is_contiguous():
            return kernels.soft_topk_backward(x, solution, scale, v, largest, form)
    return backward_op(x, k, alpha, alpha_number, solution, v, largest, form, backend)


def either(tensor: Tensor | None, number: float) -> Tensor | float:
    return number if tensor is None else tensor


def per_row(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous result (..., *shape) for the rows of x, in the compute dtype."""
    return x.new_empty((*x.shape[:-1], *shape), dtype=dtype or compute_dtype(x.dtype))


@register(
    f"soft_topk(Tensor x, {PER_ROW}, bool largest, str form, str? backend) -> (Tensor, Tensor)",
    fake=lambda x, *_: (torch.empty_like(x), per_row(x, 5)),
    autograd=SoftTopK,
)
def soft_topk_op(x, k, k_number, alpha, alpha_number, largest, form, backend):
    """y, which is p, log p or log(1 - p) for the forms "p", "log" and "log_complement" and the hard mask for
    "hard"; and the solution (..., 5)."""
    kernels = dispatch.kernels(backend, x.device)

    def kernel(elements, values):
        (rows,), (k, alpha) = elements, values
        y, solution = solve(kernels, rows, k, k_number, alpha, alpha_number, largest, form)
        return [y], [solution]

    (y,), (solution,) = by_rows(kernel, kernels.reads, [x], [k, alpha])
    return y, solution


@register(
    f"soft_topk_backward({SOLVED}, Tensor v, bool largest, str form, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda x, *_: (torch.empty_like(x), per_row(x), per_row(x)),
    autograd=SoftTopKBackward,
)
def backward_op(x, k, alpha, alpha_number, solution, v, largest, form, backend):
    """Gradients of <v, y> to x in x's dtype, to k and alpha in the compute dtype."""
    kernels = dispatch.kernels(backend, x.device)

    def kernel(elements, values):
        (rows, v), (solution, alpha) = elements, values
        scale = either(alpha, alpha_number)
        to_x, *rest = kernels.soft_topk_backward(rows, solution, scale, v, largest, form)
        return [to_x], rest

    (to_x,), (to_k, to_alpha) = by_rows(kernel, kernels.reads, [x, v], [solution, alpha])
    return to_x, to_k, to_alpha


@register(
    f"soft_topk_tangent({SOLVED}, {DIRECTION}, bool largest, str form, str? backend) -> Tensor",
    autograd=SoftTopKTangent,
)
def tangent_op(x, k, alpha, alpha_number, solution, x_dot, k_dot, alpha_dot, largest, form, backend):
    """The derivative of y along a direction."""
    direction = Direction(x_dot, k_dot, alpha_dot)
    return derivatives.tangent(x, solution, either(alpha, alpha_number), direction, largest, form)


@register(
    f"soft_topk_backward_of_tangent({SOLVED}, Tensor v, {DIRECTION}, bool largest, str form, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    autograd=TwiceOnly,
)
def backward_of_tangent_op(
    x, k, alpha, alpha_number, solution, v, x_dot, k_dot, alpha_dot, largest, form, backend
):
    """The Hessian of <v, y> times a direction: its parts for x, k and alpha."""
    direction, scale = Direction(x_dot, k_dot, alpha_dot), either(alpha, alpha_number)
    return derivatives.backward_of_tangent(x, solution, scale, v, direction, largest, form)


@register(
    f"soft_topk_second_tangent({SOLVED}, {DIRECTION}, Tensor? x_dot2, Tensor? k_dot2, Tensor? alpha_dot2,"
    " bool largest, str form, str? backend) -> Tensor",
    autograd=TwiceOnly,
)
def second_tangent_op(
    x, k, alpha, alpha_number, solution,
    x_dot, k_dot, alpha_dot, x_dot2, k_dot2, alpha_dot2, largest, form, backend,
):  # fmt: skip
    """The second derivative of y along two directions."""
    one, other = Direction(x_dot, k_dot, alpha_dot), Direction(x_dot2, k_dot2, alpha_dot2)
    return derivatives.second_tangent(x, solution, either(alpha, alpha_number), one, other, largest, form)


@register(
    "hard_topk_mask(Tensor x, Tensor? k, float k_number, bool largest, str? backend) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
)
def mask_op(x, k, k_number, largest, backend):
    """1 for what hard_topk selects, 0 elsewhere, in x's dtype."""
    kernels = dispatch.kernels(backend, x.device)

    def kernel(elements, values):
        return [kernels.hard_topk_mask(elements[0], either(values[0], k_number), largest)], []

    (mask,), _ = by_rows(kernel, kernels.reads, [x], [k])
    return mask


@register(
    "hard_topk_indices(Tensor x, Tensor? k, float k_number, int max_k, bool largest, str? backend)"
    " -> (Tensor, Tensor)",
    fake=lambda x, k, k_number, max_k, *_: (
        per_row(x, max_k, dtype=torch.int64),
        per_row(x, dtype=torch.int64),
    ),
)
def indices_op(x, k, k_number, max_k, largest, backend):
    """The indices (..., max_k) of what hard_topk selects, and their counts (...)."""
    kernels = dispatch.kernels(backend, x.device)

    def kernel(elements, values):
        k = either(values[0], k_number)
        return [], list(kernels.hard_topk_indices(elements[0], k, max_k, largest))

    _, (indices, counts) = by_rows(kernel, kernels.reads, [x], [k])
    return indices, counts
