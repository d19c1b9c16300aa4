"""Numbers that the host reads from the device without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """A small tensor on its way to the host: `put` it, and `get` it some steps later.

    By then the copy is long done; what the device has been given since is not waited for.
    """

    def __init__(self):
        self.copy: Tensor | None = None
        self.done: torch.cuda.Event | None = None

    def put(self, value: Tensor):
        if value.is_cuda:
            self.copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self.copy.copy_(value, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()
        else:
            self.copy = value.clone()

    def get(self) -> list | None:
        """What was put last, None where that was taken already."""
        if self.copy is None:
            return None
        if self.done is not None:
            self.done.synchronize()
        value, self.copy = self.copy.tolist(), None
        return value

    def pending(self) -> list | None:
        """What `get` will give, for a checkpoint."""
        value = self.get()
        if value is not None:
            self.copy, self.done = torch.tensor(value, dtype=torch.float64), None
        return value

    def restore(self, value: list | None):
        self.copy, self.done = None if value is None else torch.tensor(value, dtype=torch.float64), None
