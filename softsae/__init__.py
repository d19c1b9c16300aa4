"""softsae: adaptive sparse autoencoders on softtopk's differentiable top-k."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softsae.architectures import (
        AdaptiveKConfig,
        BatchTopKConfig,
        EstimatorConfig,
        FeatureChoiceConfig,
        GatedConfig,
        JumpReLUConfig,
        MSAEConfig,
        ReLUConfig,
        Section,
        SoftSAEConfig,
    )
    from softsae.autoencoder import SparseAutoencoder, load
    from softsae.config import (
        AutoencoderConfig,
        RegularizerConfig,
        RunConfig,
        TrainConfig,
        corrected,
        published,
    )
    from softsae.encode import encode_source, read_codes
    from softsae.language_model import attach, load_language_model
    from softsae.metrics import evaluate
    from softsae.output import Output
    from softsae.recipes import recipe
    from softsae.selectors import Selection, Selector, register
    from softsae.sweep import Sweep
    from softsae.trainer import Trainer

# Where each public name lives. Loaded when first used: the command line's --help needs no torch.
HOMES = {
    "AdaptiveKConfig": "architectures",
    "AutoencoderConfig": "config",
    "BatchTopKConfig": "architectures",
    "EstimatorConfig": "architectures",
    "FeatureChoiceConfig": "architectures",
    "GatedConfig": "architectures",
    "JumpReLUConfig": "architectures",
    "MSAEConfig": "architectures",
    "Output": "output",
    "ReLUConfig": "architectures",
    "RegularizerConfig": "config",
    "RunConfig": "config",
    "Section": "architectures",
    "Selection": "selectors",
    "Selector": "selectors",
    "SoftSAEConfig": "architectures",
    "SparseAutoencoder": "autoencoder",
    "Sweep": "sweep",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "attach": "language_model",
    "corrected": "config",
    "encode_source": "encode",
    "evaluate": "metrics",
    "load": "autoencoder",
    "load_language_model": "language_model",
    "published": "config",
    "read_codes": "encode",
    "recipe": "recipes",
    "register": "selectors",
}

__all__ = [
    "AdaptiveKConfig",
    "AutoencoderConfig",
    "BatchTopKConfig",
    "EstimatorConfig",
    "FeatureChoiceConfig",
    "GatedConfig",
    "JumpReLUConfig",
    "MSAEConfig",
    "Output",
    "ReLUConfig",
    "RegularizerConfig",
    "RunConfig",
    "Section",
    "Selection",
    "Selector",
    "SoftSAEConfig",
    "SparseAutoencoder",
    "Sweep",
    "TrainConfig",
    "Trainer",
    "attach",
    "corrected",
    "encode_source",
    "evaluate",
    "load",
    "load_language_model",
    "published",
    "read_codes",
    "recipe",
    "register",
]


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'softsae' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"softsae.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
