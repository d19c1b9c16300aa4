"""What each architecture has to be told: a section of the configuration for every selection rule.

A field that is None takes the value of the run's mode (`resolved`). Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from softsae.checks import choice, integer, number, optional


@dataclass
class EstimatorConfig:
    """The k estimator of SoftSAE: k_hat = k_max * sigmoid(w2 . relu(W_k (x - b_dec) + c) + c2)."""

    kind: Literal["wide", "bottleneck"] = "wide"
    """'wide': W_k is (n, d), a copy of W_enc at the start, as published; 'bottleneck': (width, d)"""
    width: int = 64
    """hidden units of the bottleneck"""
    init: Literal["target", "random"] | None = None
    """what c2 starts from: 'target' so that k_hat = k, 'random' as torch.nn.Linear, as published"""
    moves_b_dec: bool | None = None
    """whether the gradient of k_hat moves b_dec (published: True)"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """the dtype k_hat is rounded to; the published code runs it under bfloat16 autocast"""

    def __post_init__(self):
        choice("estimator.kind", self.kind, ("wide", "bottleneck"))
        integer("estimator.width", self.width, 1)
        choice("estimator.init", self.init, ("target", "random", None))
        choice("estimator.moves_b_dec", self.moves_b_dec, (True, False, None))
        choice("estimator.dtype", self.dtype, ("float32", "bfloat16", None))


@dataclass
class Section:
    """The options of one architecture."""

    alpha = None  # the final scale of a soft selection; None where there is none
    dial = "k"  # what sets L0: k, or a field of the section

    def fit(self, k: float, n: int):
        """ValueError where the options contradict k or the number of latents n."""

    def resolved(self, k: float, n: int, as_published: bool):
        """A copy in which no field is None."""
        return self


@dataclass
class SoftSAEConfig(Section):
    """SoftSAE: k_hat by an estimator, learned through the soft selection."""

    k_max: float | None = None
    """the largest k_hat; None is 2 k"""
    k_min: float = 1.0
    """the smallest k_hat"""
    alpha: float = 1e-4
    """scale of the soft selection, in the units of the normalised activations"""
    selection_gradient: Literal["k", "all"] | float | None = None
    """what the gradient of the selection reaches: 'k' the budget only, 'all' also the activations, as
    published, or a number that scales the activations' part"""
    rounding: Literal["nearest", "floor"] | None = None
    """the budget of the hard selection, 'nearest' or, as published, 'floor' of k_hat"""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    """the k estimator"""

    def __post_init__(self):
        number("k_min", self.k_min, 0, math.inf)
        optional(number, "k_max", self.k_max, 0, math.inf, above=True)
        number("alpha", self.alpha, 0, math.inf, above=True)
        if self.selection_gradient not in ("k", "all", None):
            if isinstance(self.selection_gradient, str):
                raise ValueError(
                    f"selection_gradient={self.selection_gradient!r} must be 'k', 'all' or a number"
                )
            number("selection_gradient", self.selection_gradient, 0, math.inf)
        choice("rounding", self.rounding, ("nearest", "floor", None))

    def fit(self, k: float, n: int):
        number("k_min", self.k_min, 0, n)
        optional(number, "k_max", self.k_max, 0, n, above=True)
        if self.k_min > k:
            raise ValueError(f"k_min={self.k_min} exceeds k={k}")
        if self.k_max is not None and self.k_max <= k:
            raise ValueError(f"k_max={self.k_max} must exceed the target k={k}")

    def resolved(self, k: float, n: int, as_published: bool) -> SoftSAEConfig:
        estimator = fill(
            self.estimator,
            init="random" if as_published else "target",
            moves_b_dec=as_published,
            dtype="bfloat16" if as_published else "float32",
        )
        return fill(
            dataclasses.replace(self, estimator=estimator),
            k_max=float(min(2 * k, n)),
            selection_gradient="all" if as_published else "k",
            rounding="floor" if as_published else "nearest",
        )


@dataclass
class TopKConfig(Section):
    """TopK has nothing besides k."""


@dataclass
class BatchTopKConfig(Section):
    """BatchTopK: the k B largest activations of a batch of B; at inference those above a threshold."""

    threshold_decay: float = 0.999
    """decay rate of the running mean of the smallest activation kept, the threshold at inference"""
    threshold_from: int = 1000
    """the step from which on it is followed; until then the threshold is the last smallest one"""

    def __post_init__(self):
        number("threshold_decay", self.threshold_decay, 0, 1, below=True)
        integer("threshold_from", self.threshold_from, 0)


@dataclass
class FeatureChoiceConfig(BatchTopKConfig):
    """Feature Choice: the k B / n largest activations of each latent in a batch of B."""


@dataclass
class JumpReLUConfig(Section):
    """JumpReLU: activations above a learned threshold each; the mean L0 is drawn to k by a loss."""

    threshold: float = 1e-3
    """what every threshold starts from, in the units of the normalised activations"""
    bandwidth: float = 1e-3
    """width of the window around a threshold in which it gets a gradient"""
    sparsity_weight: float = 1.0
    """weight of (L0 / k - 1)^2, relative to mean |x|^2 as the reconstruction loss is"""
    sparsity_warmup_steps: int = 2000
    """steps in which that weight rises linearly"""

    def __post_init__(self):
        number("threshold", self.threshold, 0, math.inf)
        number("bandwidth", self.bandwidth, 0, math.inf, above=True)
        number("sparsity_weight", self.sparsity_weight, 0, math.inf)
        integer("sparsity_warmup_steps", self.sparsity_warmup_steps, 0)


@dataclass
class ReLUConfig(Section):
    """ReLU with an L1 penalty; the mean L0 is what the penalty makes of it, k is not used."""

    dial = "l1_weight"
    l1_weight: float = 0.1
    """weight of sum_i f_i |d_i|, relative to mean |x|^2 as the reconstruction loss is"""
    l1_warmup_steps: int = 2000
    """steps in which that weight rises linearly"""

    def __post_init__(self):
        number("l1_weight", self.l1_weight, 0, math.inf)
        integer("l1_warmup_steps", self.l1_warmup_steps, 0)


@dataclass
class GatedConfig(ReLUConfig):
    """Gated: which latents are active and how much are two linear maps that share their directions.

    The penalty is on the gates, sum_i relu(gate_i) |d_i|.
    """


# Every architecture with its section and the class of its rule, which is imported when it is needed.
ARCHITECTURES: dict[str, tuple[type[Section], str]] = {
    "softsae": (SoftSAEConfig, "softsae.selectors.softsae:SoftSAE"),
    "topk": (TopKConfig, "softsae.selectors.topk:TopK"),
    "batchtopk": (BatchTopKConfig, "softsae.selectors.batchtopk:BatchTopK"),
    "featurechoice": (FeatureChoiceConfig, "softsae.selectors.batchtopk:FeatureChoice"),
    "jumprelu": (JumpReLUConfig, "softsae.selectors.jumprelu:JumpReLU"),
    "relu": (ReLUConfig, "softsae.selectors.relu:ReLU"),
    "gated": (GatedConfig, "softsae.selectors.gated:Gated"),
}


def fill(config, **values):
    """A copy with the given values where the field is None."""
    return dataclasses.replace(
        config, **{name: value for name, value in values.items() if getattr(config, name) is None}
    )
