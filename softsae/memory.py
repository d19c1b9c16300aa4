"""What of a GPU's memory a training has needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from softsae.autoencoder import SparseAutoencoder
from softtopk.optim import Adam


def memory_of(sae: SparseAutoencoder, optimizer: Adam, device: torch.device) -> dict[str, int]:
    """In bytes: the `peak` of what the process had allocated, and its parts: parameters, gradients, the
    optimizer's state, copies of weights for products in another dtype, and the rest, which is the batch, what
    a step makes, and whatever else the process holds there."""
    parameters = list(sae.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    parts = {
        "parameters": size(parameters),
        "gradients": size(p.grad for p in parameters if p.grad is not None),
        "optimizer": size(value for value in state if isinstance(value, Tensor)),
        "copies": size(optimizer.copies.values()),
    }
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak": peak, **parts, "rest": peak - sum(parts.values())}


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
