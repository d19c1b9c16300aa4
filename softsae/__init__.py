"""softsae: adaptive sparse autoencoders on softtopk's differentiable top-k."""

from softsae.autoencoder import Output, SparseAutoencoder, load
from softsae.config import (
    AutoencoderConfig,
    EstimatorConfig,
    RunConfig,
    TrainConfig,
    corrected,
    published,
)
from softsae.metrics import evaluate
from softsae.trainer import Trainer

__all__ = [
    "AutoencoderConfig",
    "EstimatorConfig",
    "Output",
    "RunConfig",
    "SparseAutoencoder",
    "TrainConfig",
    "Trainer",
    "corrected",
    "evaluate",
    "load",
    "published",
]
