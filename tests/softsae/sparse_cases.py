"""Autoencoders and trainings that have a sparse path, for the tests of it."""

from __future__ import annotations

import torch

from softsae import (
    AdaptiveKConfig,
    AutoencoderConfig,
    EstimatorConfig,
    MSAEConfig,
    SoftSAEConfig,
    SparseAutoencoder,
    TrainConfig,
    Trainer,
)
from softsae.activations.synthetic import SyntheticSource

D, N, K = 32, 256, 8
SOURCE = SyntheticSource(D, 64, 1, 10)
ALPHA = 0.1  # at 1e-4 what rounds differently is amplified from step to step


def softsae(**options) -> AutoencoderConfig:
    return AutoencoderConfig(n=N, k=K, softsae=SoftSAEConfig(**{"alpha": ALPHA, **options}))


def other(architecture: str, **fields) -> AutoencoderConfig:
    return AutoencoderConfig(n=N, k=K, architecture=architecture, **fields)


# Name -> the autoencoder and what its training has besides.
CASES: dict[str, tuple[AutoencoderConfig, dict]] = {
    "topk": (other("topk"), {}),
    "topk-nested": (other("topk", matryoshka=[1 / 8, 1 / 4, 5 / 8]), {}),
    "batchtopk": (other("batchtopk"), {}),
    "msae": (other("msae", msae=MSAEConfig(ks=[4, 8, 24], weighting="reverse")), {}),
    "adaptivek": (other("adaptivek", adaptivek=AdaptiveKConfig(joint_from=0.5, samples=512)), {}),
    "adaptivek-published": (
        other("adaptivek", adaptivek=AdaptiveKConfig(joint_from=0.5, samples=512)),
        {"mode": "published"},
    ),
    "softsae-wide": (softsae(), {}),
    "softsae-bottleneck-all": (
        softsae(selection_gradient="all", estimator=EstimatorConfig("bottleneck", 16, moves_b_dec=True)),
        {"clip": "global"},
    ),
    "softsae-shared-scaled": (
        softsae(selection_gradient=0.3, estimator=EstimatorConfig("shared", moves_encoder=True)),
        {"hard_phase": "frozen_estimator"},
    ),
    "softsae-shared-apart": (softsae(estimator=EstimatorConfig("shared")), {}),
    "softsae-linear-nested": (
        AutoencoderConfig(
            n=N, k=K, matryoshka=[0.25, 0.75],
            softsae=SoftSAEConfig(alpha=ALPHA, estimator=EstimatorConfig("linear")),
        ),
        {},
    ),
    "softsae-constant": (softsae(estimator=EstimatorConfig(input="constant")), {}),
    "softsae-published": (
        softsae(alpha=ALPHA / 4),  # of activations in other units
        {"mode": "published", "alpha_start": ALPHA / 4, "k_anneal_steps": 0},
    ),
}  # fmt: skip


def midway(sae: SparseAutoencoder) -> SparseAutoencoder:
    """In float64, with parameters as in the middle of a training."""
    sae = sae.double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.1)
        sae.normalize_decoder()
    return sae


class Roomy(Trainer):
    """A row of a code has room for all latents."""

    def start(self, source, held_out=None):
        super().start(source, held_out)
        self.path.max_active = N


class Exactly(Roomy):
    """Trains in float64 as well."""

    def start(self, source, held_out=None):
        super().start(source, held_out)
        self.sae.double()

    def train_step(self, batch, logged):
        return super().train_step(batch.double(), logged)


def trainer(name: str, out=None, callbacks=(), kind: type[Trainer] = Roomy, **train) -> Trainer:
    model, own = CASES[name]
    given = {
        "steps": 60, "batch_size": 64, "lr": 2e-3, "log_every": 1, "hard_steps": 15, "dead_after": 600,
        "device": "cpu",
    }  # fmt: skip
    config = TrainConfig(**{**given, **own, **train})
    return kind(model, config, out=out, callbacks=callbacks, progress=False)


def records(name: str, kind: type[Trainer] = Roomy, **train) -> tuple[Trainer, list[dict]]:
    """A training's trainer and the lines of its steps."""
    found: list[dict] = []
    run = trainer(name, callbacks=[lambda _, record: found.append(record)], kind=kind, **train)
    run.fit(SOURCE)
    return run, [record for record in found if "event" not in record]
