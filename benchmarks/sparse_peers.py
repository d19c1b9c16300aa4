"""What the sparse decoder and its backward are timed beside, each under one signature.

    python -m benchmarks.sparse_peers              # what is there, and why the rest is not

    F.embedding_bag           of torch
    sparsify                  SOFTTOPK_PEER_SPARSIFY: a checkout of https://github.com/EleutherAI/sparsify
    OpenAI                    SOFTTOPK_PEER_OPENAI: one of https://github.com/openai/sparse_autoencoder

Nothing of theirs is copied: the one file with their Triton kernels is loaded from there. A checkout without
.git is given its commit by VARIABLE_COMMIT.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.features import one_line
from benchmarks.implementations import folder, version_of
from benchmarks.sparse_bars import EMBEDDING_BAG, OPENAI, SPARSIFY

SPARSIFY_FOLDER, OPENAI_FOLDER = "SOFTTOPK_PEER_SPARSIFY", "SOFTTOPK_PEER_OPENAI"


@dataclass
class Peer:
    """decode(indices (B, k) int64, values (B, k), weight (n, d)) -> (B, d), and
    backward(indices, values, weight, g (B, d)) -> a call that gives the gradients of weight and of values."""

    name: str
    version: str
    decode: Callable[..., Tensor]
    backward: Callable[..., Callable[[], tuple[Tensor, Tensor]]]
    values_dtype: torch.dtype | None = None  # None: the weight's
    recorded: bool = True  # whether a CUDA graph can hold its backward


def module_from(file: Path, name: str) -> ModuleType:
    """A Python file as a module of its own, whatever package it lies in."""
    if not file.exists():
        raise ImportError(f"{file.parent.name} has no {file.name}")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sparsify() -> Peer:
    kernels = module_from(folder(SPARSIFY_FOLDER) / "sparsify" / "xformers.py", "peer_sparsify")
    return Peer(
        SPARSIFY,
        version_of(SPARSIFY_FOLDER),
        lambda indices, values, weight: kernels.embedding_bag_triton(indices, weight, values),
        lambda indices, values, weight, g: partial(
            kernels.embedding_bag_bw_rev_indices, indices, weight, values, g
        ),
    )


def openai() -> Peer:
    kernels = module_from(folder(OPENAI_FOLDER) / "sparse_autoencoder" / "kernels.py", "peer_openai")

    def both(indices, values, weight, g):
        grad = kernels.triton_sparse_transpose_dense_matmul(indices, values, g, N=len(weight))
        return grad, kernels.triton_dense_dense_sparseout_matmul(g, weight.T, indices)

    # With values in float32, so that what its backward adds up atomically is float32.
    return Peer(
        OPENAI,
        version_of(OPENAI_FOLDER),
        kernels.triton_sparse_dense_matmul,
        lambda *arguments: partial(both, *arguments),
        values_dtype=torch.float32,
    )


def embedding_bag() -> Peer:
    def decode(indices, values, weight):
        bag = torch.nn.functional.embedding_bag
        return bag(indices, weight, per_sample_weights=values, mode="sum")

    def backward(indices, values, weight, g):
        leaves = weight.detach().requires_grad_(), values.detach().requires_grad_()
        out = decode(indices, leaves[1], leaves[0])
        return partial(torch.autograd.grad, out, leaves, g, retain_graph=True)

    return Peer(EMBEDDING_BAG, torch.__version__, decode, backward, recorded=False)


PEERS: dict[str, Callable[[], Peer]] = {EMBEDDING_BAG: embedding_bag, SPARSIFY: sparsify, OPENAI: openai}
GPU_ONLY = (SPARSIFY, OPENAI)


def load(device: str) -> tuple[list[Peer], dict[str, str]]:
    """The peers that are there, and every name with its version or, "absent: ...", what is missing."""
    peers, found = [], {}
    for name, make in PEERS.items():
        if device == "cpu" and name in GPU_ONLY:
            continue
        try:
            peers.append(make())
        except Exception as error:  # not there, or it does not import here
            found[name] = f"absent: {one_line(error)}"
        else:
            found[name] = peers[-1].version
    return peers, found


if __name__ == "__main__":
    for name, version in load("cuda" if torch.cuda.is_available() else "cpu")[1].items():
        print(f"{name}: {version}")
