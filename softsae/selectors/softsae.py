"""SoftSAE (arXiv 2605.06610): the k_hat(x) largest activations, k_hat learned through soft top-k.

Soft phase: latents = a * p, p = soft_topk(a, k_hat, alpha), a = relu(pre). Hard phase and
inference: the round(k_hat) largest. At alpha = 1e-4 the gradient of p to the activations is
thousands of times that of the reconstruction and, under a common clip, the dictionary is not
learned; so by default the selection's gradient reaches k_hat only (`selection_gradient`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from softsae.config import AutoencoderConfig, TrainConfig
from softsae.k_estimator import KEstimator
from softsae.losses import budget
from softsae.schedules import Phase
from softsae.selectors.contract import Selection, Selector
from softsae.sparse import Sparse, centered, encode
from softtopk import hard_topk, soft_topk
from softtopk.gate import gated, rectify

BELOW_ACTIVE = math.nextafter(2.0**-24, 0.0)  # a gate of at least 2^-24 counts as active


class SoftSAE(Selector):
    """latents = a * soft_topk(a, k_hat, alpha), or a * hard_topk(a, k_hat)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.estimator = KEstimator(config)

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase, k_hat: Tensor | None = None) -> Selection:
        learns = torch.is_grad_enabled() and phase.learns == "all"
        rectified = self.gates_alone(phase)
        a = rectify(pre) if rectified else torch.relu_(pre)  # [B, n]
        if k_hat is None:
            with torch.set_grad_enabled(learns):
                k_hat = self.estimator(sae, x, a)  # [B]
        if phase.hard and not learns:
            if phase.learns == "decoder":
                a = a.detach()
            return Selection(a * self.hard_mask(a, k_hat), k_hat, a)
        p = soft_topk(self.routed(a), k_hat, phase.alpha)
        if not phase.hard:
            return Selection(gated(a, p, BELOW_ACTIVE, rectified=rectified), k_hat, a)
        with torch.no_grad():  # the gradient of p is not touched by what its value is set to
            p.copy_(self.hard_mask(a, k_hat))
        return Selection(a * p, k_hat, a)

    def by_rows(self, phase: Phase) -> bool:
        return self.config.softsae.estimator.kind != "shared"  # that takes its h(x) from the pass itself

    def row_budgets(self, sae, x: Tensor, phase: Phase, sparse: Sparse, centered: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase.learns == "all"):
            return self.estimator(sae, x, None, sparse, centered)

    def dense_only(self, phase: Phase) -> str | None:
        floor = self.config.softsae.rounding == "floor"
        if phase.hard and phase.learns == "all" and floor and phase.step is not None:
            return "rounding 'floor' with hard_phase 'all': a code has the mask of the rounded budget"
        return None

    def sparse(self, sae, x: Tensor, phase: Phase, sparse: Sparse) -> Selection:
        learns = torch.is_grad_enabled() and phase.learns == "all"
        rows = centered(sae, x, sparse)  # [B, d]
        with torch.set_grad_enabled(learns):
            k_hat = self.estimator(sae, x, None, sparse, rows)  # [B]
        floor = self.config.softsae.rounding == "floor"
        if phase.hard and (floor or not learns):
            k = k_hat.detach().floor() if floor else k_hat.detach()
            with torch.set_grad_enabled(torch.is_grad_enabled() and phase.learns != "decoder"):
                return Selection(encode(sae, x, sparse, k, rows=rows), k_hat)
        share = {"all": 1.0, "k": 0.0}.get(self.config.softsae.selection_gradient)
        share = self.config.softsae.selection_gradient if share is None else share
        options = {"hard": phase.hard, "selection_gradient": share}
        code = encode(sae, x, sparse, k_hat, phase.alpha, rows, **options)
        return Selection(code, k_hat)

    def normed(self) -> tuple[str, ...]:
        options = self.config.softsae.estimator
        own = options.kind in ("wide", "bottleneck") and options.input == "x"
        return (*(() if options.moves_encoder else ("W_enc",)), *(("selector.estimator.W",) if own else ()))

    def most_active(self) -> float:
        return self.config.softsae.k_max

    def gates_alone(self, phase: Phase) -> bool:
        """Whether the activations get a gradient through their gates alone, so that these see to the ReLU."""
        options = self.config.softsae
        routed = options.selection_gradient not in ("k", 0) or options.estimator.moves_encoder
        return not (phase.hard or routed or phase.regularizer is not None)

    def routed(self, a: Tensor) -> Tensor:
        """a, with as much of the selection's gradient as selection_gradient lets through."""
        share = self.config.softsae.selection_gradient
        if share == "all":
            return a
        return a.detach() if share == "k" or share == 0 else ScaleGradient.apply(a, share)

    def hard_mask(self, a: Tensor, k_hat: Tensor) -> Tensor:
        k_hat = k_hat.detach()
        return hard_topk(a.detach(), k_hat.floor() if self.config.softsae.rounding == "floor" else k_hat)

    def loss_terms(self, sae, target: Tensor, selection: Selection, phase: Phase) -> dict[str, Tensor]:
        if phase.learns != "all":
            return {}
        return {"budget": budget(selection.k_hat, phase.k_target, phase.softplus_beta)}

    def loss_weights(self, train: TrainConfig, square_norm: float, step: int) -> dict[str, float]:
        return {"budget": train.budget_weight}

    def initialize(self, W_enc: Tensor, generator: torch.Generator):
        self.estimator.initialize(W_enc, generator)

    def estimator_parameters(self) -> list[nn.Parameter]:
        return list(self.estimator.parameters())


class ScaleGradient(torch.autograd.Function):
    """The identity, with the gradient multiplied by a number."""

    @staticmethod
    def forward(ctx, a, scale):
        ctx.scale = scale
        return a.view_as(a)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None
