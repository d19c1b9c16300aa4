"""What each architecture has to be told: a section of the configuration for every selection rule.

A field that is None takes the value of the run's mode (`resolved`). Nothing here imports torch.
`softsae.register` adds architectures of the user's own.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from softsae.checks import choice, integer, number, optional
from softsae.keys import build

MEASURED_SCORES = ("local_dimension", "token_loss")  # of complexity, for AdaptiveK


@dataclass
class EstimatorConfig:
    """The k estimator of SoftSAE: k_hat = k_max * sigmoid(w2 . h(x) + c2)."""

    kind: Literal["wide", "bottleneck", "shared", "linear"] = "wide"
    """h(x): 'wide' relu(W_k (x - b_dec) + c) with W_k (n, d), a copy of W_enc at the start, as published;
    'bottleneck' with W_k (width, d); 'shared' the autoencoder's own activations relu(W_enc (x - b_dec) +
    b_enc); 'linear' x - b_dec"""
    width: int = 64
    """hidden units of the bottleneck"""
    init: Literal["target", "random"] | None = None
    """what w2 and c2 start from: 'target' from 0 and so that k_hat = k, 'random' as torch.nn.Linear, as
    published"""
    moves_b_dec: bool | None = None
    """whether the gradient of k_hat moves b_dec (published: True); 'shared' asks moves_encoder instead"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """the dtype k_hat is rounded to; the published code runs it under bfloat16 autocast"""
    input: Literal["x", "constant"] = "x"
    """what it sees: 'x' or, an ablation with as many parameters, the same random 'constant' vector of the
    inputs' mean norm for every sample: k_hat then is one learned number"""
    moves_encoder: bool = False
    """whether the gradient of k_hat goes through 'shared' activations to W_enc, b_enc and b_dec"""

    def __post_init__(self):
        choice("estimator.kind", self.kind, ("wide", "bottleneck", "shared", "linear"))
        integer("estimator.width", self.width, 1)
        choice("estimator.input", self.input, ("x", "constant"))
        choice("estimator.moves_encoder", self.moves_encoder, (True, False))
        if self.moves_encoder and self.kind != "shared":
            raise ValueError(f"estimator.moves_encoder is for kind 'shared', not {self.kind!r}")
        choice("estimator.init", self.init, ("target", "random", None))
        choice("estimator.moves_b_dec", self.moves_b_dec, (True, False, None))
        choice("estimator.dtype", self.dtype, ("float32", "bfloat16", None))


@dataclass
class Section:
    """The options of one architecture: a dataclass, whose fields JSON can hold."""

    alpha = None  # the final scale of a soft selection; None where there is none
    dial = "k"  # what sets L0: k, or a field of the section
    top_k = True  # whether the largest of several activations are kept; False: each by itself, as in relu
    joint_from = 0.0  # the share of the steps in which the estimator is frozen
    lr_multiplier = 1.0  # of the estimator's learning rate, in corrected mode

    def fit(self, k: float, n: int):
        """ValueError where the options contradict k or the number of latents n."""

    def resolved(self, k: float, n: int, as_published: bool):
        """A copy in which no field is None, apart from numbers of steps."""
        return self

    def scheduled(self, steps: int):
        """A copy in which no number of steps is None, for a training of `steps`."""
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

    @property
    def lr_multiplier(self) -> float:
        return 5.0 if self.estimator.kind in ("wide", "shared") else 1.0

    def fit(self, k: float, n: int):
        number("k_min", self.k_min, 0, n)
        optional(number, "k_max", self.k_max, 0, n, above=True)
        if self.k_min > k:
            raise ValueError(f"k_min={self.k_min} exceeds k={k}")
        if self.k_max is None and k >= n:
            raise ValueError(f"k={k} must be below n={n}: the mean of k_hat stays below k_max")
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
class MSAEConfig(Section):
    """MSAE: every k of a list reconstructs by itself, and the loss is their mean; inference uses `k`."""

    ks: list[int] | None = None
    """the budgets, ascending, `k` one of them; None is k, 2 k, 4 k ... and n (published: with k = 64)"""
    weighting: Literal["uniform", "reverse"] = "uniform"
    """weights of their losses: 'uniform', or 'reverse': m, m - 1 ... 1 for m budgets, the smallest first"""

    def __post_init__(self):
        if self.ks is not None:
            if not isinstance(self.ks, (list, tuple)) or not self.ks:
                raise ValueError(f"ks={self.ks!r} must be a list of budgets")
            for k in self.ks:
                integer("ks", k, 1)
            if any(a >= b for a, b in zip(self.ks, self.ks[1:], strict=False)):
                raise ValueError(f"ks={self.ks!r} must be ascending")
            self.ks = list(self.ks)
        choice("weighting", self.weighting, ("uniform", "reverse"))

    def fit(self, k: float, n: int):
        number("k", k, 0.5, n)
        if self.ks is None:
            return
        integer("ks", self.ks[-1], 1, n)
        if math.floor(k + 0.5) not in self.ks:
            raise ValueError(f"ks={self.ks!r} must hold k={k}, the budget at inference")

    def resolved(self, k: float, n: int, as_published: bool) -> MSAEConfig:
        doubled, budget = [], math.floor(k + 0.5)
        while budget < n:
            doubled.append(budget)
            budget *= 2
        return fill(self, ks=[*doubled, n])


@dataclass
class AdaptiveKConfig(Section):
    """AdaptiveK: k by a linear probe for the complexity of the activation, fitted before training.

    The probe is frozen while the autoencoder trains and learns as well in a last, joint phase.
    """

    scores: str = "local_dimension"
    """complexity of the stored activations, which the probe is fitted to: 'local_dimension' (estimated
    from the activations themselves), 'token_loss' (of the language model: softsae collect with
    --collect.scores true) or an .npy file with one number for each activation, in their stored order"""
    mapping: Literal["ranks", "min_max", "none"] = "ranks"
    """of the scores to 0 ... 10: their 'ranks', so that no outlier squeezes the others together and the
    mean is 5, where k_hat is k; 'min_max'; or 'none' for scores that are in 0 ... 10 already"""
    samples: int = 16_384
    """activations that the probe is fitted to, a fifth of them held out for its R^2"""
    neighbours: int = 20
    """nearest neighbours among these samples that the local dimension is estimated from: with more of
    them, or fewer samples, it is the dimension at a larger scale"""
    ridge: float = 100.0
    """weight of |w|^2 beside the summed squared errors of the probe, for activations of unit mean square"""
    k_min: float | None = None
    """k_hat of the score minus infinity; None is 2 k - k_max"""
    k_max: float | None = None
    """k_hat of the score infinity; None is 2 k - k_min or, with neither given, 32/17 k: the published
    20 ... 320 scaled to the midpoint k"""
    joint_from: float = 0.9
    """the share of the steps after which the probe learns as well; 1 keeps it as it was fitted. By 0.9 the
    learning rate is falling (decay_from): an earlier start gives the reconstruction more say"""
    alpha: float = 1e-4
    """scale of the soft selection whose gradient the probe gets in the joint phase, in the units of
    the normalised activations"""
    selection_gradient: bool | None = None
    """whether, in the joint phase, reconstruction and budget loss reach the probe, by the gradient of
    soft top-k to k (published: False, since a rounded k has none)"""
    probe_weight: float | None = None
    """weight of the probe's mean squared error in the joint phase, relative to mean |x|^2 as the
    reconstruction loss is; None is 0 (published: 0.9)"""
    deviation_weight: float | None = None
    """weight of the mean squared change of the scores since the probe was fitted, relative to mean
    |x|^2, to which it rises linearly in the joint phase; None is 0 (published: 0.9 * 0.5)"""
    l1_weight: float | None = None
    """weight of mean |f|_1 / |x|_2, x being what is reconstructed, in all phases, relative to mean |x|^2;
    None is 0 (published: 0.005)"""

    def __post_init__(self):
        if self.scores not in MEASURED_SCORES and not str(self.scores).endswith(".npy"):
            listed = ", ".join(map(repr, MEASURED_SCORES))
            raise ValueError(f"scores={self.scores!r} must be one of {listed} or an .npy file")
        choice("mapping", self.mapping, ("ranks", "min_max", "none"))
        integer("samples", self.samples, 2)
        integer("neighbours", self.neighbours, 2)
        number("ridge", self.ridge, 0, math.inf, above=True)
        for name in ("k_min", "k_max", "probe_weight", "deviation_weight", "l1_weight"):
            optional(number, name, getattr(self, name), 0, math.inf)
        number("joint_from", self.joint_from, 0, 1)
        number("alpha", self.alpha, 0, math.inf, above=True)
        choice("selection_gradient", self.selection_gradient, (True, False, None))

    def fit(self, k: float, n: int):
        optional(number, "k_min", self.k_min, 0, n)
        optional(number, "k_max", self.k_max, 0, n)
        if self.k_min is not None and self.k_max is not None and self.k_min > self.k_max:
            raise ValueError(f"k_min={self.k_min} exceeds k_max={self.k_max}")
        if self.k_min is not None and self.k_min > k:
            raise ValueError(f"k_min={self.k_min} exceeds k={k}")
        if self.k_max is not None and self.k_max < k:
            raise ValueError(f"k_max={self.k_max} is below k={k}")

    def resolved(self, k: float, n: int, as_published: bool) -> AdaptiveKConfig:
        k_max = self.k_max
        if k_max is None:
            k_max = float(min(n, 32 / 17 * k if self.k_min is None else 2 * k - self.k_min))
        return fill(
            self,
            k_max=k_max,
            k_min=float(max(0, 2 * k - k_max)),
            selection_gradient=not as_published,
            probe_weight=0.9 if as_published else 0.0,
            deviation_weight=0.45 if as_published else 0.0,
            l1_weight=0.005 if as_published else 0.0,
        )


@dataclass
class JumpReLUConfig(Section):
    """JumpReLU: activations above a learned threshold each; the mean L0 is drawn to k by a loss."""

    top_k = False
    threshold: float = 0.03
    """what every threshold starts from, relative to the norm of what is reconstructed, sqrt(mean |x|^2)
    (published: 0.001)"""
    bandwidth: float = 0.03
    """width of the window around a threshold in which it gets a gradient, relative to the same (published:
    0.001)"""
    sparsity_weight: float = 10.0
    """weight of (L0 / k - 1)^2, relative to mean |x|^2 as the reconstruction loss is (published: 1)"""
    sparsity_warmup_steps: int | None = None
    """steps in which that weight rises linearly; None is 2000, at most a twentieth of the steps"""

    def __post_init__(self):
        number("threshold", self.threshold, 0, math.inf)
        number("bandwidth", self.bandwidth, 0, math.inf, above=True)
        number("sparsity_weight", self.sparsity_weight, 0, math.inf)
        optional(integer, "sparsity_warmup_steps", self.sparsity_warmup_steps, 0)

    def scheduled(self, steps: int) -> JumpReLUConfig:
        return fill(self, sparsity_warmup_steps=min(2000, steps // 20))


@dataclass
class ReLUConfig(Section):
    """ReLU with an L1 penalty; the mean L0 is what the penalty makes of it, k is not used."""

    top_k = False
    dial = "l1_weight"
    l1_weight: float = 0.1
    """weight of sum_i f_i |d_i| beside |x - x_hat|^2, as for activations with a mean |x|^2 of 1"""
    l1_warmup_steps: int | None = None
    """steps in which that weight rises linearly; None is 2000, at most a twentieth of the steps"""

    def __post_init__(self):
        number("l1_weight", self.l1_weight, 0, math.inf)
        optional(integer, "l1_warmup_steps", self.l1_warmup_steps, 0)

    def scheduled(self, steps: int) -> ReLUConfig:
        return fill(self, l1_warmup_steps=min(2000, steps // 20))


@dataclass
class GatedConfig(ReLUConfig):
    """Gated: which latents are active and how much are two linear maps that share their directions.

    The penalty is on the gates, sum_i relu(gate_i) |d_i|.
    """


# Every architecture with its section and its rule: a class, or where it is, to be imported when needed.
ARCHITECTURES: dict[str, tuple[type[Section], str | type]] = {
    "softsae": (SoftSAEConfig, "softsae.selectors.softsae:SoftSAE"),
    "topk": (TopKConfig, "softsae.selectors.topk:TopK"),
    "batchtopk": (BatchTopKConfig, "softsae.selectors.batchtopk:BatchTopK"),
    "featurechoice": (FeatureChoiceConfig, "softsae.selectors.batchtopk:FeatureChoice"),
    "msae": (MSAEConfig, "softsae.selectors.msae:MSAE"),
    "adaptivek": (AdaptiveKConfig, "softsae.selectors.adaptivek:AdaptiveK"),
    "jumprelu": (JumpReLUConfig, "softsae.selectors.jumprelu:JumpReLU"),
    "relu": (ReLUConfig, "softsae.selectors.relu:ReLU"),
    "gated": (GatedConfig, "softsae.selectors.gated:Gated"),
}


def registered(name: str) -> bool:
    """Whether it is an architecture that `softsae.register` has added."""
    return name in ARCHITECTURES and not isinstance(ARCHITECTURES[name][1], str)


def options_field(name: str) -> str:
    """The field of AutoencoderConfig with the options of an architecture, if it has any."""
    return "options" if registered(name) else name


def section_of(name: str, options: Section | dict | None) -> Section:
    """The section of a registered architecture from its options as they were given.

    Raises ValueError for a field that it does not have or a wrong value, TypeError for another section.
    """
    kind = ARCHITECTURES[name][0]
    if isinstance(options, kind):
        return options
    if options is not None and not isinstance(options, dict):
        raise TypeError(
            f"options of {name!r} must be of the class {kind.__name__}, not {type(options).__name__}"
        )
    return build(kind, options or {}, f"options of {name!r}")


def fill(config, **values):
    """A copy with the given values where the field is None."""
    return dataclasses.replace(
        config, **{name: value for name, value in values.items() if getattr(config, name) is None}
    )
