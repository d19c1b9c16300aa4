"""What a run is made of: the autoencoder, its training, and the values each mode gives them.

A field that is None takes the value of the run's mode (`resolve`): `corrected`, the default, or
`published`, which keeps the behaviours of the SoftSAE code (arXiv 2605.06610) that change results.
Every such behaviour is a field of its own, so that the two modes differ in values only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from softsae.architectures import (
    ARCHITECTURES,
    AdaptiveKConfig,
    BatchTopKConfig,
    FeatureChoiceConfig,
    GatedConfig,
    JumpReLUConfig,
    MSAEConfig,
    ReLUConfig,
    Section,
    SoftSAEConfig,
    fill,
    options_field,
    registered,
    section_of,
)
from softsae.checks import choice, integer, nearest_choice, number, optional

NORMALIZATIONS = ("none", "unit_mean_square", "unit_mean_norm", "standardize")


@dataclass
class AutoencoderConfig:
    """A sparse autoencoder: its sizes, its selection rule, and how the input is normalised."""

    d: int | None = None
    """width of the activations; None takes it from the source"""
    d_out: int | None = None
    """width of the target, for a transcoder: it makes another vector of x, such as an MLP's output of its
    input; None is an autoencoder, or takes it from the source"""
    n: int = 4096
    """number of latents"""
    architecture: str = "softsae"
    """the selection rule: softsae, topk, batchtopk, featurechoice, msae, adaptivek, jumprelu,
    relu or gated"""
    k: float = 32.0
    """active latents per sample: exactly for topk, in the mean for others"""
    normalization: Literal["none", "unit_mean_square", "unit_mean_norm", "standardize"] | None = None
    """of the input: 'unit_mean_square' (mean of x^2 over samples and dimensions is 1),
    'unit_mean_norm' (mean of |x|^2 is 1, as published), 'standardize' (shift and scale of
    each dimension) or 'none'"""
    matryoshka: list[float] | None = None
    """shares of the latents that make nested groups, such as [1/32, 1/16, 1/8, 1/4, 17/32]: every prefix
    of groups reconstructs by itself, and the loss is their mean; with any architecture; null is none"""
    softsae: SoftSAEConfig = field(default_factory=SoftSAEConfig)
    """options of softsae"""
    batchtopk: BatchTopKConfig = field(default_factory=BatchTopKConfig)
    """options of batchtopk"""
    featurechoice: FeatureChoiceConfig = field(default_factory=FeatureChoiceConfig)
    """options of featurechoice"""
    msae: MSAEConfig = field(default_factory=MSAEConfig)
    """options of msae"""
    adaptivek: AdaptiveKConfig = field(default_factory=AdaptiveKConfig)
    """options of adaptivek"""
    jumprelu: JumpReLUConfig = field(default_factory=JumpReLUConfig)
    """options of jumprelu"""
    relu: ReLUConfig = field(default_factory=ReLUConfig)
    """options of relu"""
    gated: GatedConfig = field(default_factory=GatedConfig)
    """options of gated"""
    options: dict[str, Any] | Section | None = None
    """options of an architecture that softsae.register has added"""

    def __post_init__(self):
        if self.d is not None:
            integer("d", self.d, 1)
        optional(integer, "d_out", self.d_out, 1)
        integer("n", self.n, 1)
        nearest_choice("architecture", self.architecture, ARCHITECTURES)
        number("k", self.k, 0, self.n, above=True)
        choice("normalization", self.normalization, (*NORMALIZATIONS, None))
        if self.matryoshka is not None:
            if self.architecture == "msae":
                raise ValueError(f"matryoshka={self.matryoshka!r}: msae nests budgets: give one of them")
            self.prefixes()
        for name in self.sections():
            kind, value = ARCHITECTURES[name][0], getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}={value!r} must be of the class {kind.__name__}")
            if name != self.architecture and value != kind():
                raise ValueError(f"{name}: options are given, but the architecture is {self.architecture!r}")
        if registered(self.architecture):
            self.options = section_of(self.architecture, self.options)
        elif self.options is not None:
            raise ValueError(
                f"options: they are for registered architectures, {self.architecture!r} is built in and has"
                " a section of its name"
            )
        self.section.fit(self.k, self.n)

    def prefixes(self) -> list[int]:
        """Where the nested prefixes of the latents end, the last one at n."""
        shares = self.matryoshka
        if not isinstance(shares, (list, tuple)) or len(shares) < 2:
            raise ValueError(f"matryoshka={shares!r} must list two shares or more")
        for share in shares:
            number("matryoshka", share, 0, 1, above=True)
        if not math.isclose(sum(shares), 1, rel_tol=1e-6):
            raise ValueError(f"matryoshka={shares!r} must sum to 1, not {sum(shares):g}")
        ends = [math.floor(self.n * sum(shares[: i + 1]) + 0.5) for i in range(len(shares))]
        if ends[0] < 1 or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"matryoshka={shares!r} leaves a group of the {self.n} latents empty")
        return ends

    def sections(self) -> list[str]:
        """The architectures that have options here."""
        return [f.name for f in dataclasses.fields(self) if f.name in ARCHITECTURES]

    @property
    def section_field(self) -> str | None:
        """The field that holds the options of the architecture, None where it has none."""
        name = options_field(self.architecture)
        return name if hasattr(self, name) else None

    @property
    def section(self) -> Section:
        """The options of the architecture."""
        name = self.section_field
        return ARCHITECTURES[self.architecture][0]() if name is None else getattr(self, name)

    def with_section(self, section: Section) -> AutoencoderConfig:
        """A copy with other options of the architecture."""
        name = self.section_field
        return self if name is None else dataclasses.replace(self, **{name: section})


@dataclass
class RegularizerConfig:
    """Penalties on the activations a = relu(pre) before a top-k selection (arXiv 2606.27321).

    With S_b the latents selected for sample b and A those selected for any sample of the batch,

        R1 = mean_b sum_{i in A - S_b} a_bi        R2 = mean_b |a_b[A]|_1 / |a_b[A]|_2

    Where the paper leaves open how terms are added up and weighted, this is our reading.
    """

    r1_weight: float = 0.0
    """weight of R1 beside |x - x_hat|^2, as for activations with a mean |x|^2 of 1"""
    r2_weight: float = 0.0
    """weight of R2, relative to mean |x|^2 as the reconstruction loss is"""
    r1_reduction: Literal["sum", "mean"] = "sum"
    """R1 of a sample is the 'sum' over the units of A - S_b, or the 'mean' over those of the whole batch"""
    all_units: bool = False
    """put all latents in the place of A"""

    def __post_init__(self):
        number("regularizer.r1_weight", self.r1_weight, 0, math.inf)
        number("regularizer.r2_weight", self.r2_weight, 0, math.inf)
        choice("regularizer.r1_reduction", self.r1_reduction, ("sum", "mean"))
        choice("regularizer.all_units", self.all_units, (True, False))

    def weights(self, square_norm: float) -> dict[str, float]:
        """Of the loss terms that are wanted, by name: R1 grows with the units, R2 does not."""
        given = {"r1": self.r1_weight * math.sqrt(square_norm), "r2": self.r2_weight * square_norm}
        return {name: weight for name, weight in given.items() if weight}


@dataclass
class TrainConfig:
    """How it is trained. Steps count batches; None takes the value of the mode (`resolve`)."""

    mode: Literal["corrected", "published"] = "corrected"
    """'corrected' or 'published'"""
    steps: int = 10_000
    """optimizer steps"""
    batch_size: int = 2048
    """samples per step"""
    lr: float | None = None
    """learning rate of Adam; None is c / sqrt(n / 2^14), c = 5e-4 (published: 2e-4)"""
    warmup_steps: int | None = None
    """steps of linear warm-up of the learning rate; None is 1000, at most a twentieth of the steps"""
    decay_from: float = 0.8
    """the fraction of the steps after which the learning rate falls linearly to 0"""
    adam_beta1: float = 0.9
    """decay rate of Adam's first moment"""
    adam_beta2: float = 0.999
    """decay rate of Adam's second moment"""
    clip: Literal["separate", "global"] | None = None
    """one 'global' norm for all gradients, as published, or the estimator's 'separate'"""
    clip_norm: float = 1.0
    """largest norm of the gradient"""
    estimator_clip_norm: float = 1.0
    """largest norm of the estimator's gradient, where clipped separately"""
    estimator_lr_multiplier: float | None = None
    """learning rate of the k estimator relative to lr; None is 5 (wide, shared), 1 (others,
    adaptivek's probe; published)"""
    k_anneal_steps: int | None = None
    """steps in which the target of the mean k_hat falls from d to k; None is 0, since a target above
    k_max saturates the sigmoid of every k_hat before it is learned (published: 1% of the steps)"""
    alpha_start: float | None = None
    """alpha at the first step; None starts at its final value (published: 1)"""
    alpha_anneal_steps: int | None = None
    """steps in which alpha falls linearly to its final value; None is 1% of the steps"""
    hard_steps: int | None = None
    """last steps, with the hard selection; None is 10% of the steps (published: 4%)"""
    hard_phase: Literal["all", "frozen_estimator", "decoder"] | None = None
    """what learns in them: 'all', all but the estimator ('frozen_estimator') or, as published,
    the 'decoder' only"""
    budget_weight: float | None = None
    """weight of the budget loss; None is |x|^2 / k, with |x|^2 = d for unit mean square: the most a
    latent can be worth in the mean, so that the target holds (published: 1)"""
    softplus_beta: float = 5.0
    """beta of the softplus in the budget loss"""
    auxk_weight: float = 1 / 32
    """weight of AuxK relative to mean |x|^2, as the reconstruction loss is; 0 leaves it out"""
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    """penalties on activations before a top-k selection; by default none"""
    dead_after: int | None = None
    """samples without activation after which a latent is dead; None is 5% of all, at most 10 million"""
    count_logged_twice: bool | None = None
    """count a batch twice in the dead-latent tracker when its step is logged, as published"""
    nonfinite: Literal["refuse", "skip"] = "refuse"
    """what to do with samples that hold NaN or infinity"""
    seed: int = 0
    """seed of the initialisation and of the order of the samples"""
    device: str = "auto"
    """device, as torch names it; 'auto' is cuda where there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the large products; parameters, losses and k_hat are always float32"""
    path: Literal["auto", "dense", "sparse"] = "auto"
    """how latents are computed: 'dense', as a matrix with a row for each sample; 'sparse', as codes of those
    that are active, from top-k selections; 'auto' measures how many are active and takes the cheaper one"""
    sparse_below: float | None = None
    """with path 'auto', the share of active latents below which it is sparse; None is 1/16 on the CPU, on a
    GPU 1/32 or, with bfloat16 products, 1/150"""
    rows_at_a_time: int | None = None
    """samples that a dense step takes through its forward and backward pass at a time, where the selection of
    one depends on it alone (softsae but for a 'shared' estimator, topk; no regularizer, no nested groups):
    what a step needs of memory grows with them. None is twice d or, if more, what makes 8 MiB of latents;
    the batch_size takes all at once"""
    keep_copies: bool = False
    """with bfloat16 products, let the optimizer keep bfloat16 copies of the weights for sparse steps, which
    otherwise round weights where they use them: a little faster, for 2 bytes a parameter beside its 16"""
    cuda_graph: bool = True
    """on a GPU, record the step once and replay it"""
    checkpoint_every: int = 1000
    """steps between checkpoints; 0 leaves one at the end and on interruption only"""
    log_every: int = 50
    """steps between lines of metrics"""
    eval_every: int = 0
    """steps between evaluations on held-out activations, where given; 0 for the end only"""

    def __post_init__(self):
        choice("mode", self.mode, ("corrected", "published"))
        integer("steps", self.steps, 1)
        integer("batch_size", self.batch_size, 1)
        optional(number, "lr", self.lr, 0, math.inf, above=True)
        number("decay_from", self.decay_from, 0, 1)
        number("adam_beta1", self.adam_beta1, 0, 1, below=True)
        number("adam_beta2", self.adam_beta2, 0, 1, below=True)
        choice("clip", self.clip, ("separate", "global", None))
        number("clip_norm", self.clip_norm, 0, math.inf, above=True)
        number("estimator_clip_norm", self.estimator_clip_norm, 0, math.inf, above=True)
        optional(number, "estimator_lr_multiplier", self.estimator_lr_multiplier, 0, math.inf)
        for name in ("warmup_steps", "k_anneal_steps", "alpha_anneal_steps", "hard_steps"):
            optional(integer, name, getattr(self, name), 0, self.steps)
        optional(number, "alpha_start", self.alpha_start, 0, math.inf, above=True)
        choice("hard_phase", self.hard_phase, ("all", "frozen_estimator", "decoder", None))
        optional(number, "budget_weight", self.budget_weight, 0, math.inf)
        number("softplus_beta", self.softplus_beta, 0, math.inf, above=True)
        number("auxk_weight", self.auxk_weight, 0, math.inf)
        optional(integer, "dead_after", self.dead_after, 1)
        choice("count_logged_twice", self.count_logged_twice, (True, False, None))
        choice("nonfinite", self.nonfinite, ("refuse", "skip"))
        integer("seed", self.seed, 0, 2**63 - 1)
        choice("dtype", self.dtype, ("float32", "bfloat16"))
        choice("path", self.path, ("auto", "dense", "sparse"))
        optional(number, "sparse_below", self.sparse_below, 0, 1)
        optional(integer, "rows_at_a_time", self.rows_at_a_time, 1)
        choice("keep_copies", self.keep_copies, (True, False))
        choice("cuda_graph", self.cuda_graph, (True, False))
        integer("checkpoint_every", self.checkpoint_every, 0)
        integer("log_every", self.log_every, 1)
        integer("eval_every", self.eval_every, 0)


@dataclass
class RunConfig:
    """Everything that decides a trained autoencoder, apart from the activations."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def corrected(**autoencoder) -> RunConfig:
    """The default recipe for an autoencoder of the given fields (d, n, k, ...)."""
    return RunConfig(AutoencoderConfig(**autoencoder), TrainConfig(mode="corrected"))


def published(**autoencoder) -> RunConfig:
    """The recipe as published for language models: 244,140 steps of 2048, hard in the last 10,000."""
    train = TrainConfig(
        mode="published",
        steps=244_140,
        batch_size=2048,
        warmup_steps=1000,
        alpha_anneal_steps=2500,
        hard_steps=10_000,
        dead_after=10_000_000,
    )
    return RunConfig(AutoencoderConfig(**autoencoder), train)


def resolve_autoencoder(config: AutoencoderConfig, mode: str = "corrected") -> AutoencoderConfig:
    """A copy in which every field that was None, except d and d_out, has the value of the mode."""
    as_published = mode == "published"
    config = fill(config, normalization="unit_mean_norm" if as_published else "unit_mean_square")
    return config.with_section(config.section.resolved(config.k, config.n, as_published))


def resolve(config: RunConfig, d: int, d_out: int | None = None) -> RunConfig:
    """A copy in which no field is None, for activations of width d and, if any, targets of width d_out.

    Raises ValueError where the configuration says other widths or fields contradict each other.
    """
    autoencoder, train = config.autoencoder, config.train
    if autoencoder.d not in (None, d):
        raise ValueError(f"d={autoencoder.d} in the configuration, but the activations have d={d}")
    if autoencoder.d_out not in (None, d_out):
        found = "there is no target" if d_out is None else f"the target has d={d_out}"
        raise ValueError(f"d_out={autoencoder.d_out} in the configuration, but {found}")
    if not autoencoder.section.top_k and train.regularizer.weights(1.0):
        raise ValueError(
            f"regularizer: r1_weight={train.regularizer.r1_weight}, r2_weight={train.regularizer.r2_weight}"
            f" need a top-k selection, the architecture is {autoencoder.architecture!r}"
        )
    as_published = train.mode == "published"
    autoencoder = resolve_autoencoder(dataclasses.replace(autoencoder, d=d, d_out=d_out), train.mode)
    autoencoder = autoencoder.with_section(autoencoder.section.scheduled(train.steps))
    final_alpha = autoencoder.section.alpha
    samples = train.steps * train.batch_size
    train = fill(
        train,
        lr=(2e-4 if as_published else 5e-4) / math.sqrt(autoencoder.n / 2**14),
        warmup_steps=min(1000, train.steps // 20),
        clip="global" if as_published else "separate",
        estimator_lr_multiplier=1.0 if as_published else autoencoder.section.lr_multiplier,
        k_anneal_steps=train.steps // 100 if as_published else 0,
        alpha_start=1.0 if as_published or final_alpha is None else final_alpha,
        alpha_anneal_steps=train.steps // 100,
        hard_steps=train.steps // (25 if as_published else 10),
        hard_phase="decoder" if as_published and autoencoder.architecture == "softsae" else "all",
        budget_weight=1.0 if as_published else square_norm(autoencoder) / autoencoder.k,
        dead_after=max(1, min(10_000_000, samples // 20)),
        count_logged_twice=as_published,
    )
    if final_alpha is not None and train.alpha_start < final_alpha:
        raise ValueError(f"alpha_start={train.alpha_start} is below the final alpha={final_alpha}")
    return dataclasses.replace(config, autoencoder=autoencoder, train=train)


def shortened(train: TrainConfig, steps: int) -> TrainConfig:
    """The training in `steps` steps at most, with its phases shortened in proportion."""
    if steps >= train.steps:
        return train
    phases = ("warmup_steps", "k_anneal_steps", "alpha_anneal_steps", "hard_steps")
    given = {name: getattr(train, name) for name in phases if getattr(train, name) is not None}
    scaled = {name: round(value * steps / train.steps) for name, value in given.items()}
    return dataclasses.replace(train, steps=steps, **scaled)


def square_norm(config: AutoencoderConfig, d: int | None = None) -> float:
    """Mean |x|^2 in normalised units at width d; by default of what is reconstructed, as its loss counts."""
    return 1.0 if config.normalization == "unit_mean_norm" else float(d or config.d_out or config.d)


def own_options(values: dict) -> dict:
    """An AutoencoderConfig in asdict's form without the sections of other architectures.

    They hold the defaults of the day on which it was written.
    """
    others = ARCHITECTURES.keys() - {values["architecture"]}
    return {name: value for name, value in values.items() if name not in others}


def difference(a: dict, b: dict, path: str = "") -> str | None:
    """The first field in which two configurations (dataclasses.asdict) differ, with both values."""
    for name in [*a, *(name for name in b if name not in a)]:
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            if found := difference(left, right, f"{path}{name}."):
                return found
        elif left != right:
            return f"{path}{name}: {left!r} and {right!r}"
    return None
