"""Adam for float32 master weights: a step in one kernel, or two, and the factors of a gradient clip.

    scale, norm = clip_factor([squares_of_decoder, squares_of_encoder], max_norm=1.0)
    optimizer.step(scale=scale, found_inf=code.overflow, active={W_dec: offsets, W_enc: offsets})

Nothing here waits for the device, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softtopk import dispatch

# torch.optim.Adam's other options, as its checkpoints have them.
UNUSED = {
    "weight_decay": 0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": True,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}
SMALLEST_NORM = 1e-12
MOST_GROUPS = 16  # that clip.cu takes


class Update(NamedTuple):
    """A parameter's part of a step, for the CUDA backend: contiguous float32 tensors, a bfloat16 copy."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    step: Tensor
    scale: Tensor | None


class Adam(torch.optim.Optimizer):
    """torch.optim.Adam without weight decay and AMSGrad; what follows a step is done in the same kernel.

    Args:
        params: parameters or groups, as for torch.optim.Adam. On a GPU contiguous float32 parameters get
            the kernel, all others the same in torch.
        lr: a number, or a 0-d tensor that is read on the device.
        betas, eps: as in torch.optim.Adam.
        copies: parameter -> a tensor of its shape, as a rule in bfloat16, which every step makes the rounded
            parameter; so does `refresh_copies`, for when parameters were changed otherwise.
        normalize_rows: parameters (n, d) whose rows are scaled to unit norm after the step.

    The state has torch.optim.Adam's names (`step` as a float32 tensor on the parameter's device), so that
    each loads the other's state_dict.

    Raises:
        ValueError: an option out of range, a copy of another shape or device, rows of what is not 2-D.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        copies: Mapping[Tensor, Tensor] | None = None,
        normalize_rows: Iterable[Tensor] = (),
    ):
        self.copies = dict(copies or {})
        self.normalized = set(normalize_rows)
        for parameter, copy in self.copies.items():
            if copy.shape != parameter.shape or copy.device != parameter.device:
                raise ValueError(
                    f"a copy {tuple(copy.shape)} on {copy.device} of a parameter {tuple(parameter.shape)} on"
                    f" {parameter.device}"
                )
        for parameter in self.normalized:
            if parameter.dim() != 2:
                raise ValueError(f"normalize_rows has a parameter of shape {tuple(parameter.shape)}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, **UNUSED))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        check(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            check(group)
            group.update(UNUSED)
            for parameter in group["params"]:
                if "step" in (state := self.state[parameter]):
                    step = torch.as_tensor(state["step"])
                    state["step"] = step.to(parameter.device, torch.float32).reshape(())

    @torch.no_grad()
    def refresh_copies(self) -> None:
        for parameter, copy in self.copies.items():
            copy.copy_(parameter)

    @torch.no_grad()
    def step(
        self,
        closure=None,
        *,
        scale: Tensor | Sequence[Tensor | None] | None = None,
        found_inf: Tensor | None = None,
        active: Mapping[Tensor, Tensor] | None = None,
    ):
        """One step on the parameters that have a gradient.

        Args:
            closure: computes the loss again, and its gradients.
            scale: what gradients are multiplied by: one 0-d tensor, or one for each group. The gradients
                themselves are left as they are.
            found_inf: a tensor of one element on the device: unless it is 0, nothing changes, the steps
                that are counted included.
            active: parameter (n, ...) -> int32 offsets (n + 1,), as of a transposed code: a row l with
                offsets[l] = offsets[l + 1] has no gradient. It is not read, and its moments, the parameter
                and the copy stay as they are (as with torch.optim.SparseAdam; torch.optim.Adam would let
                the moments decay and move the parameter).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = active or {}
        counted = 1.0
        if found_inf is not None:
            found_inf = found_inf.reshape(()).to(torch.float32)
            counted = torch.eq(found_inf, 0, out=torch.empty_like(found_inf))
        learning, flat = [], {}
        for index, group in enumerate(self.param_groups):
            factor = scale if scale is None or isinstance(scale, Tensor) else scale[index]
            learning += [(p, group, factor) for p in group["params"] if p.grad is not None]
        for parameter, *_ in learning:
            self.prepare(parameter)
        if learning:
            steps = [self.state[parameter]["step"] for parameter, *_ in learning]
            torch._foreach_add_(steps, counted if found_inf is None else [counted] * len(steps))
        for parameter, group, factor in learning:
            waits = self.update(parameter, group, factor, found_inf, active.get(parameter))
            if waits is not None:
                flat.setdefault(parameter.device, []).append(waits)
        for updates in flat.values():
            dispatch.module("cuda").adam_flat(updates, found_inf)
        for parameter, *_ in learning:
            copy = self.copies.get(parameter)
            if copy is not None and not fits(copy):
                copy.copy_(parameter)
        return loss

    def prepare(self, parameter: Tensor) -> None:
        """The state of a parameter, before its first step."""
        if parameter.grad.is_sparse:
            raise RuntimeError("softtopk.optim.Adam takes dense gradients; see `active`")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)

    def update(self, parameter, group, scale, found_inf, offsets):
        """The step of one parameter, or what is left to be done in a launch with those of others."""
        state, copy = self.state[parameter], self.copies.get(parameter)
        if offsets is not None and offsets.shape != (len(parameter) + 1,):
            raise ValueError(f"offsets {tuple(offsets.shape)} of a parameter {tuple(parameter.shape)}")
        moments = state["exp_avg"], state["exp_avg_sq"]
        normalize = parameter in self.normalized
        native = natively(parameter, *moments)
        dtype = torch.float32 if native else parameter.dtype
        arguments = (
            parameter,
            parameter.grad.contiguous() if native else parameter.grad,
            *moments,
            copy if copy is not None and fits(copy) else None,
            number(group["lr"]),
            group["betas"],
            group["eps"],
            state["step"],
            None if scale is None else scale.reshape(()).to(dtype),
        )
        if not native:
            adam_step(*arguments, found_inf, offsets, normalize)
            return None
        update = Update(*arguments)
        if offsets is None and not normalize:
            return update
        dispatch.module("cuda").adam_rows(update, found_inf, offsets, normalize)
        return None


def fits(copy: Tensor) -> bool:
    """Whether a copy is written by what writes the parameter."""
    return copy.dtype == torch.bfloat16 and copy.is_contiguous()


class Clipped(NamedTuple):
    """What is clipped together, in any parts: squares, or gradients; and the largest norm of it."""

    squares: Sequence[Tensor]
    gradients: Sequence[Tensor]
    max_norm: float


def clip_factor(squares: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """(scale, norm), 0-d float32 tensors on the device, of a gradient whose squares are given in any parts.

    norm is the root of the sum of all squares, scale = min(1, max_norm / (norm + 1e-6)) as in
    torch.nn.utils.clip_grad_norm_; both are NaN where a square is.
    """
    scales, norms = clip_factors([Clipped(squares, [], max_norm)])
    return scales[0], norms[0]


def clip_factors(groups: Sequence[Clipped]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The scales and the norms of groups, each as `clip_factor` says; of a group without parts 1 and 0.

    Where all parts are float32 on one GPU, that takes two kernels.
    """
    parts = [part for group in groups for part in (*group.squares, *group.gradients)]
    if (
        parts
        and natively(*parts)
        and len({part.device for part in parts}) == 1
        and len(groups) <= MOST_GROUPS
    ):
        out = dispatch.module("cuda").clip_factors(
            [group[:2] for group in groups], [g.max_norm for g in groups]
        )
        return out[0].unbind(), out[1].unbind()
    device = parts[0].device if parts else None
    return tuple(zip(*(factor(group, device) for group in groups), strict=True))


def factor(group: Clipped, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """The same of one group in torch."""
    squares = [part.reshape(-1) for part in group.squares]
    if group.gradients:
        squares += [norm.square().reshape(1) for norm in torch._foreach_norm(group.gradients)]
    squares = squares or [torch.zeros(1, device=device)]
    total = torch.cat(squares).sum(dtype=torch.float64)
    norm = total.sqrt()
    return (group.max_norm / (norm + 1e-6)).clamp(max=1.0).float(), norm.float()


def adam_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    offsets: Tensor | None,
    normalize: bool,
) -> None:
    """The update in torch, on any device; step is the number of this one."""
    beta1, beta2 = betas
    if offsets is None and all(plain(t, parameter.dtype) for t in (parameter, gradient, exp_avg, exp_avg_sq)):
        if found_inf is None or found_inf == 0:
            gradient = gradient if scale is None else gradient * scale
            in_one_pass(parameter, gradient, exp_avg, exp_avg_sq, lr, betas, eps, step)
            if normalize:
                parameter.div_(parameter.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM))
            if copy is not None:
                copy.copy_(parameter)
        return
    if scale is not None:
        gradient = gradient * scale
    moment = exp_avg.lerp(gradient, 1 - beta1)
    square = (exp_avg_sq * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    count = step.double()  # as float32, 1 - beta^step would lose digits
    rate = lr / (1 - beta1**count)
    new = parameter - rate * (moment / (square.sqrt() / (1 - beta2**count).sqrt() + eps))
    if normalize:
        new = new / new.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
    live = None if found_inf is None else found_inf == 0
    if offsets is not None:
        rows = (offsets[1:] != offsets[:-1]).view(-1, *(1,) * (parameter.dim() - 1))
        live = rows if live is None else live & rows
    for old, value in ((parameter, new), (exp_avg, moment), (exp_avg_sq, square)):
        old.copy_(value if live is None else torch.where(live, value, old))
    if copy is not None:
        copy.copy_(parameter)


def plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's kernel for the CPU takes a tensor."""
    return x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous()


def in_one_pass(parameter, gradient, exp_avg, exp_avg_sq, lr: float, betas, eps: float, step) -> None:
    """torch.optim.Adam's kernel for the CPU."""
    torch._fused_adam_(
        [parameter], [gradient], [exp_avg], [exp_avg_sq], [], [step],
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def natively(*tensors: Tensor) -> bool:
    """Whether the CUDA backend's kernel takes a parameter and its moments."""
    fits = all(t.is_cuda and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return fits and dispatch.module("cuda") is not None


def number(lr: float | Tensor) -> float | Tensor:
    """A tensor on the host is a number; one on the device is float32."""
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return float(lr)
    return lr.reshape(()).to(torch.float32)


def check(group: dict) -> None:
    """ValueError for a group with options that are out of range, or that this optimizer does not have."""
    lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"lr={lr} must be at least 0")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas={group['betas']} must be in [0, 1)")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must be at least 0")
    for name in ("weight_decay", "amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name}={group[name]} is an option of torch.optim.Adam alone")
