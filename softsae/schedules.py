"""What changes with the step: learning rate, target of the mean k_hat, alpha, soft or hard phase."""

from __future__ import annotations

from typing import NamedTuple

from softsae.config import RegularizerConfig, RunConfig


class Phase(NamedTuple):
    """What the autoencoder has to know about the moment of training.

    alpha: scale of the soft selection, None where there is none. k_target: target of the mean k_hat.
    hard: whether the round(k_hat) largest are selected. learns: "all", "frozen_estimator" or
    "decoder" (only the decoder learns). softplus_beta: of the budget loss. step: of training, None at
    inference. regularizer: penalties on the activations before the selection, None where there are none.
    """

    alpha: float | None
    k_target: float
    hard: bool
    learns: str = "all"
    softplus_beta: float = 5.0
    step: int | None = None
    regularizer: RegularizerConfig | None = None


class Schedule:
    """The phase and the learning rate of every step 0 ... steps - 1 of a resolved configuration."""

    def __init__(self, config: RunConfig):
        self.autoencoder, self.train = config.autoencoder, config.train

    def phase(self, step: int) -> Phase:
        model, train = self.autoencoder, self.train
        hard = step >= train.steps - train.hard_steps
        frozen = step < model.section.joint_from * train.steps
        return Phase(
            alpha=self.alpha(step),
            k_target=linear(step, train.k_anneal_steps, model.d, model.k),
            hard=hard,
            learns="frozen_estimator" if frozen else train.hard_phase if hard else "all",
            softplus_beta=train.softplus_beta,
            step=step,
            regularizer=train.regularizer if train.regularizer.weights(1.0) else None,
        )

    def alpha(self, step: int) -> float | None:
        final = self.autoencoder.section.alpha
        return final and linear(step, self.train.alpha_anneal_steps, self.train.alpha_start, final)

    def lr(self, step: int) -> float:
        """Linear warm-up over warmup_steps, constant, from decay_from * steps linear to 0."""
        train = self.train
        rise = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
        start = train.decay_from * train.steps
        fall = (train.steps - step) / (train.steps - start) if step > start else 1.0
        return train.lr * min(rise, fall)


def linear(step: int, steps: int, start: float, final: float) -> float:
    """From start at step 0 to final at step `steps`; final at once where steps is 0."""
    return final if step >= steps else start + (final - start) * (step / steps)


def warm(step: int, steps: int) -> float:
    """A weight that rises linearly to 1 within `steps`."""
    return min(1.0, (step + 1) / steps) if steps else 1.0
