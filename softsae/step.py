"""One step of training as a function of a batch: losses, gradients, clip, update, what was active.

Nothing in it waits for the device, and which kernels it launches depends on its plan alone, not on what
tensors hold: so it runs as it is, or is recorded in a CUDA graph (softsae/graph.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from softsae import metrics
from softsae.autoencoder import SparseAutoencoder
from softsae.config import RunConfig
from softsae.dead import DeadLatents, DeadList, Revived
from softsae.parts import Passed, derive, in_parts, rows_at_a_time, whole
from softsae.schedules import Phase
from softsae.sparse import Sparse
from softtopk.optim import Adam, Clipped, clip_factors


class Numbers(NamedTuple):
    """What changes from step to step: numbers or, in a recorded step, 0-d tensors that are written before.

    phase: its alpha and k_target are such numbers as well. weights: of the loss terms by name, 1 where a
    name is missing.
    """

    phase: Phase
    lr: float | Tensor
    weights: dict[str, float | Tensor]


class Result(NamedTuple):
    """What a step leaves on the device: scalars by name, and what others are made from where they are wanted
    (`Step.report`): reconstruction (B, d_out) in normalised units, k_hat (B,) and fired (n,) bool."""

    scalars: dict[str, Tensor]
    reconstruction: Tensor
    k_hat: Tensor
    fired: Tensor


class Plan(NamedTuple):
    """What decides the kernels of a step, apart from the phase: whether it is sparse and if so with how many
    places for a row, and the list of the dead latents, of which the length counts."""

    max_active: int | None
    dead: DeadList


class Support(NamedTuple):
    """What steps leave behind on the device for the choice of the path."""

    mean: Tensor  # () active latents of a row in the last batch
    most: Tensor  # () the most that a row had since this was last set to 0
    skipped: Tensor  # () steps that were skipped, because a code had no room for its row

    @classmethod
    def of(cls, memory: Tensor) -> Support:
        """The views of one tensor (3,)."""
        return cls(*memory)


class Step:
    """Steps of one autoencoder.

    Args:
        sae: the autoencoder.
        config: resolved.
        optimizer: over the autoencoder's parameters and, as a second group, the estimator's.
        dead: the tracker that counts the batches.
        support: what is measured.
        measure: whether dense steps measure as well.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        config: RunConfig,
        optimizer: Adam,
        dead: DeadLatents,
        support: Support,
        measure: bool,
    ):
        self.sae, self.train, self.optimizer, self.dead = sae, config.train, optimizer, dead
        self.support, self.measure = support, measure
        self.names = {parameter: name for name, parameter in sae.named_parameters()}
        self.squares: dict[str, Tensor] = {}
        self.ready = False

    def prepare_sparse(self):
        """Make what sparse steps need besides the weights: the buffers of squared norms and, where copies in
        the dtype of the products are wanted, these, which the optimizer then keeps up to date."""
        if self.ready:
            return
        self.ready = True
        if self.train.dtype == "bfloat16" and self.train.keep_copies:
            for parameter in self.names:
                if parameter.dim() == 2:
                    self.optimizer.copies[parameter] = parameter.detach().bfloat16()
        parameters = dict(self.sae.named_parameters())
        for name in ("W_dec", *self.sae.selector.normed()):
            if parameters[name].dtype == torch.float32:
                self.squares[name] = parameters[name].new_zeros(len(parameters[name]))

    def how(self, plan: Plan) -> Sparse | None:
        if plan.max_active is None:
            return None
        dtype = torch.bfloat16 if self.train.dtype == "bfloat16" else None
        copies = {self.names[parameter]: copy for parameter, copy in self.optimizer.copies.items()}
        return Sparse(plan.max_active, False, dtype, copies, self.squares, project=True)

    def __call__(self, x: Tensor, target: Tensor | None, numbers: Numbers, plan: Plan) -> Result:
        """One step on x (B, d)."""
        sae, how = self.sae, self.how(plan)
        self.optimizer.zero_grad(set_to_none=True)
        for squares in self.squares.values():
            squares.zero_()
        # In this thread: another would have a cuBLAS workspace of its own, 32 MiB on an H200.
        with torch.autograd.set_multithreading_enabled(False):
            passed, terms, loss = self.gradients(x, target, numbers, plan, how)
        if how is None:
            sae.project_decoder_gradient()
        scale, norms = self.clip({} if how is None else how.squares)
        for group in self.optimizer.param_groups:
            group["lr"] = numbers.lr if group["multiplier"] == 1 else numbers.lr * group["multiplier"]
        self.optimizer.step(scale=scale, found_inf=passed.overflow)
        l0, fired = self.count(passed, how is not None, len(x))
        scalars = {
            "loss": loss.detach(),
            **{f"loss_{name}": term.detach() for name, term in terms.items()},
            "l0": l0,
            **norms,
        }
        return Result(scalars, passed.reconstruction, passed.k_hat, fired)

    def gradients(
        self, x: Tensor, target: Tensor | None, numbers: Numbers, plan: Plan, how: Sparse | None
    ) -> tuple[Passed, dict[str, Tensor], Tensor]:
        """Forward and backward: the pass, the loss terms by name and the loss; parameters have gradients."""
        sae, train, phase = self.sae, self.train, numbers.phase
        half = train.dtype == "bfloat16"
        autocast = {"enabled": half and how is None, "cache_enabled": False}
        dtype, rows = torch.bfloat16 if half else sae.W_enc.dtype, len(x)
        if how is None:
            rows = rows_at_a_time(sae, phase, rows, dtype, train.rows_at_a_time)
        if rows < len(x):
            passed = in_parts(sae, x, target, phase, numbers.weights, rows, dtype)
        else:
            with torch.autocast(x.device.type, torch.bfloat16, **autocast):
                passed = whole(sae, x, target, phase, how)
        terms = dict(passed.losses)
        revived = Revived(sae, plan.dead, how) if train.auxk_weight and len(plan.dead.indices) else None
        if revived is not None:
            with torch.autocast(x.device.type, torch.bfloat16, **autocast):
                terms["auxk"] = revived.loss(x, passed.reconstruction, target)
        loss = weighted(terms, numbers.weights)
        derive(loss, passed.pending)
        if revived is not None:
            revived.add_gradients()
        return passed, terms, loss

    def clip(self, known: Mapping[str, Tensor]) -> tuple[Tensor | tuple[Tensor, ...], dict[str, Tensor]]:
        """What gradients are to be multiplied by, the estimator's apart or with the others, and their norms.

        known: the squared norms of gradients' rows that the backward pass has left, by parameter.
        """
        train, groups = self.train, [group["params"] for group in self.optimizer.param_groups]
        limits = (train.clip_norm, train.estimator_clip_norm)
        if train.clip == "global":
            groups = [sum(groups, [])]
        parts = [self.clipped(group, known, limit) for group, limit in zip(groups, limits, strict=False)]
        scales, norms = clip_factors(parts)
        names = ("grad_norm", "estimator_grad_norm")
        return scales[0] if train.clip == "global" else scales, dict(zip(names, norms, strict=False))

    def clipped(self, parameters: list[Tensor], known: Mapping[str, Tensor], limit: float) -> Clipped:
        learning = [parameter for parameter in parameters if parameter.grad is not None]
        squares = [known[name] for name in map(self.names.get, learning) if name in known]
        others = [parameter.grad for parameter in learning if self.names[parameter] not in known]
        return Clipped(squares, others, limit)

    @torch.no_grad()
    def count(self, passed: Passed, sparse: bool, samples: int) -> tuple[Tensor, Tensor]:
        """Count the batch's active latents; their mean number in a row, and which were active (n,)."""
        found = passed.activity
        self.dead.update(found.fired, samples)
        if self.measure or sparse:
            torch.div(found.entries, samples, out=self.support.mean)
            torch.maximum(self.support.most, found.most, out=self.support.most)
        if passed.overflow is not None:
            self.support.skipped.add_(passed.overflow)
        return found.active / samples, found.fired

    @torch.no_grad()
    def report(self, result: Result, wanted: Tensor) -> dict[str, Tensor]:
        """What is to be logged of a step on a batch that was to be reconstructed."""
        x_hat, k_hat = self.sae.denormalize(result.reconstruction), result.k_hat
        return {
            **result.scalars,
            "explained_variance": metrics.explained_variance(wanted, x_hat),
            "k_hat_mean": k_hat.mean(),
            "k_hat_sd": k_hat.std(correction=0),
            "dead_latents": self.dead.count(),
        }


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor]) -> Tensor:
    """The sum of the terms; what has no weight, and the first, costs no kernel."""
    parts = [weights[name] * term if name in weights else term for name, term in terms.items()]
    return functools.reduce(torch.add, parts)
