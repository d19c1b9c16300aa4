"""Which path a step takes, dense or sparse, and with how many places for a row of a code.

While the scale of a soft selection is annealed from 1 every latent is active, and a code of them would be
larger than the matrix. What is active is therefore measured, on the device, and read by the host some steps
later, so that it does not wait. A row that has more active latents than its code has places makes the
device skip the step, and the code larger when the host reads of it.
"""

from __future__ import annotations

import torch

from softsae.config import RunConfig
from softsae.reading import Reading
from softsae.schedules import Phase
from softsae.selectors import Selector
from softsae.sparse import places
from softsae.step import Support

CHECK = 16  # steps between decisions
LAG = 4  # steps between what a decision is made from and itself
# The share of active latents below which a sparse step is the faster one, by the dtype of the products. It
# reads rows of the weights for the active latents only; dense products take all, in float32 more slowly.
SPARSE_BELOW = {"bfloat16": 1 / 150, "float32": 1 / 32}
RETURN = 1.5  # times that share: above it a sparse step becomes dense again


class PathChoice:
    """The choice for one run. `config` is resolved; `start` is the first phase."""

    def __init__(self, config: RunConfig, selector: Selector, start: Phase, device: torch.device):
        self.train, self.n, self.selector = config.train, config.autoencoder.n, selector
        given = self.train.sparse_below
        self.below = SPARSE_BELOW[self.train.dtype] if given is None else given
        self.max_active = min(places(selector.most_active()), places(self.n))
        # Nothing is measured yet: without a soft selection, or at its final scale, L0 is what is asked for.
        final = start.alpha == config.autoencoder.section.alpha
        few = selector.expected_active() <= self.below * self.n
        self.sparse = self.train.path == "sparse" or (self.train.path == "auto" and final and few)
        self.memory = torch.zeros(len(Support._fields), dtype=torch.float64, device=device)
        self.support = Support.of(self.memory)
        self.reading = Reading()
        self.skipped = 0.0

    @property
    def measures_dense(self) -> bool:
        """Whether what is active has to be measured in dense steps."""
        return self.train.path == "auto"

    def dense_only(self, phase: Phase) -> str | None:
        """Why a step in a phase cannot be sparse, None where it can."""
        if phase.regularizer is not None:
            return "the regularizers are on activations that are not selected"
        return self.selector.dense_only(phase)

    def places(self, step: int, phase: Phase) -> int | None:
        """The places of a row in the code of this step, None for a dense one. To be asked for every step."""
        if step % CHECK == 0:
            self.decide(self.reading.get())
        elif step % CHECK == CHECK - LAG and self.train.path != "dense":
            self.reading.put(self.memory)
            self.support.most.zero_()
        return self.max_active if self.sparse and self.dense_only(phase) is None else None

    def decide(self, read: list | None):
        if read is None:
            return
        mean, most, skipped = read
        if skipped > self.skipped:
            self.make_room(most)
        self.skipped = skipped
        if self.train.path != "auto":
            return
        if not self.sparse and mean <= self.below * self.n:
            self.sparse = True
            self.make_room(most)
        elif self.sparse and mean > RETURN * self.below * self.n:
            self.sparse = False

    def make_room(self, most: float):
        self.max_active = max(self.max_active, places(most))

    def report(self, places: int | None, phase: Phase) -> dict:
        """For the metrics: the path of a step with so many places, and why it is dense if it was to be
        sparse."""
        if places is not None:
            return {"path": "sparse", "max_active": places, "skipped_steps": self.support.skipped.clone()}
        reason = self.dense_only(phase) if self.train.path == "sparse" else None
        return {"path": "dense", **({} if reason is None else {"dense_because": reason})}

    def state(self) -> dict:
        """For a checkpoint."""
        return {
            "sparse": self.sparse,
            "max_active": self.max_active,
            "skipped": self.skipped,
            "memory": self.memory.tolist(),
            "reading": self.reading.pending(),
        }

    def restore(self, state: dict | None):
        """What `state` gave; the path itself only where it is not said in the configuration."""
        if state is None:
            return
        if self.train.path == "auto":
            self.sparse = state["sparse"]
        self.max_active, self.skipped = state["max_active"], state["skipped"]
        self.memory.copy_(torch.tensor(state["memory"], dtype=torch.float64))
        self.reading.restore(state["reading"])
