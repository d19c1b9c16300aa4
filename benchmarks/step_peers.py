"""Trainers of others, each as a training step on a batch.

    python -m benchmarks.step_peers                # what is there, and why the rest is not

    SoftSAE, its authors      SOFTTOPK_PEER_SOFTSAE: a checkout of https://github.com/St0pien/SoftSAE (arXiv
                              2605.06610), with LapSum's CUDA operator from SOFTTOPK_PEER_LAPSUM, as in
                              implementations.py; the checkout has one of its own in the folder lapsum
    TopK, dictionary_learning SOFTTOPK_PEER_DICTIONARY_LEARNING: a checkout of
                              https://github.com/saprmarks/dictionary_learning
    TopK, sparsify            SOFTTOPK_PEER_SPARSIFY: https://github.com/EleutherAI/sparsify
    TopK, SAELens             SOFTTOPK_PEER_SAELENS: https://github.com/jbloomAus/SAELens

Only the modules of a trainer are imported, from where they lie: packages are entered without their __init__,
which would ask for much that a step does not need. A checkout without .git is given its commit by
VARIABLE_COMMIT.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import implementations
from benchmarks.features import one_line
from benchmarks.implementations import folder, version_of
from benchmarks.sparse_bars import SOFTSAE_REFERENCE, TOPK_REFERENCE

SOFTSAE = "SOFTTOPK_PEER_SOFTSAE"
DICTIONARY_LEARNING = "SOFTTOPK_PEER_DICTIONARY_LEARNING"
SPARSIFY = "SOFTTOPK_PEER_SPARSIFY"
SAELENS = "SOFTTOPK_PEER_SAELENS"
SPARSIFY_TRAINER, SAELENS_TRAINER = "TopK, sparsify", "TopK, SAELens"
STEPS = 100_000  # of the training that the timed steps would be the middle of


@dataclass
class Training:
    """update(step, x (B, d)) does one step; parameters: what it trains with Adam."""

    update: Callable[[int, Tensor], object]
    parameters: list[Tensor]


@dataclass
class Peer:
    """make(rows, d, n, k, device) -> a Training; precisions: those in which it is timed."""

    name: str
    version: str
    make: Callable[[int, int, int, int, str], Training]
    precisions: tuple[str, ...]


def entered(name: str, path: Path, **attributes) -> ModuleType:
    """A package whose modules can be imported, without its __init__."""
    if not path.is_dir():
        raise ImportError(f"{path.parent.name} has no folder {path.name}")
    package = ModuleType(name)
    package.__path__ = [str(path)]
    vars(package).update(attributes)
    sys.modules[name] = package
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, package)
    return package


def trainable(module: torch.nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def softsae(device: str) -> Peer:
    implementations.load("LapSum C++", device)  # its module lapsum.topk
    root = folder(SOFTSAE) / "dictionary_learning" / "dictionary_learning"
    entered("dictionary_learning", root)
    entered("dictionary_learning.trainers", root / "trainers")
    trainers = importlib.import_module("dictionary_learning.trainers.soft_sae")

    def make(rows: int, d: int, n: int, k: int, device: str) -> Training:
        trainer = trainers.SoftSAETrainer(
            steps=STEPS, activation_dim=d, dict_size=n, k=k, layer=0, lm_name="", seed=0, device=device
        )
        return Training(trainer.update, trainable(trainer.ae))

    return Peer(SOFTSAE_REFERENCE, version_of(SOFTSAE), make, ("float32", "TF32"))


def dictionary_learning(device: str) -> Peer:
    root = folder(DICTIONARY_LEARNING) / "dictionary_learning"
    entered("peer_dictionary_learning", root)  # not under its own name, which SoftSAE's copy has
    entered("peer_dictionary_learning.trainers", root / "trainers")
    trainers = importlib.import_module("peer_dictionary_learning.trainers.top_k")

    def make(rows: int, d: int, n: int, k: int, device: str) -> Training:
        trainer = trainers.TopKTrainer(
            steps=STEPS, activation_dim=d, dict_size=n, k=k, layer=0, lm_name="", seed=0, device=device
        )
        return Training(trainer.update, trainable(trainer.ae))

    return Peer(TOPK_REFERENCE, version_of(DICTIONARY_LEARNING), make, ("float32", "TF32"))


def sparsify(device: str) -> Peer:
    """Its trainer runs a language model for every batch; this is what it does with the activations, by its
    own functions: float32 weights, a forward pass under bfloat16 autocast, its Triton decoder, Adam."""
    if device == "cpu":
        raise ImportError("its forward pass asks for CUDA")
    entered("sparsify", folder(SPARSIFY) / "sparsify")
    coder = importlib.import_module("sparsify.sparse_coder")
    config = importlib.import_module("sparsify.config")

    def make(rows: int, d: int, n: int, k: int, device: str) -> Training:
        torch.manual_seed(0)
        sae = coder.SparseCoder(d, config.SparseCoderConfig(num_latents=n, k=k), device, torch.float32)
        optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (n / 2**14) ** 0.5)

        def update(step: int, x: Tensor) -> float:
            sae.set_decoder_norm_to_unit_norm()
            out = sae(x)
            out.fvu.backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            return float(out.fvu.detach())

        return Training(update, trainable(sae))

    return Peer(SPARSIFY_TRAINER, version_of(SPARSIFY), make, ("bfloat16",))


def saelens(device: str) -> Peer:
    """A step of its SAETrainer without its logs, with the options of a configuration with autocast."""
    root = folder(SAELENS) / "sae_lens"
    package = entered("sae_lens", root, __version__="of the checkout", logger=logging.getLogger("sae_lens"))
    registry = importlib.import_module("sae_lens.registry")
    package.register_sae_class = registry.register_sae_class
    entered("sae_lens.saes", root / "saes")
    entered("sae_lens.loading", root / "loading")
    topk = importlib.import_module("sae_lens.saes.topk_sae")
    base = importlib.import_module("sae_lens.saes.sae")

    def make(rows: int, d: int, n: int, k: int, device: str) -> Training:
        torch.manual_seed(0)
        sae = topk.TopKTrainingSAE(topk.TopKTrainingSAEConfig(d_in=d, d_sae=n, k=k, device=device))
        sae.train()
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4, betas=(0.9, 0.999))
        silent = torch.zeros(n, device=device)

        def update(step: int, x: Tensor) -> None:
            with torch.autocast(device, torch.bfloat16):
                given = base.TrainStepInput(
                    sae_in=x,
                    coefficients=dict(sae.get_coefficients()),
                    dead_neuron_mask=silent > 1000,
                    n_training_steps=step,
                )
                out = sae.training_forward_pass(step_input=given)
            fired = out.feature_acts.detach().bool().any(0)
            silent.add_(1).masked_fill_(fired, 0)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return Training(update, trainable(sae))

    return Peer(SAELENS_TRAINER, version_of(SAELENS), make, ("bfloat16",))


PEERS: dict[str, Callable[[str], Peer]] = {
    SOFTSAE_REFERENCE: softsae,
    TOPK_REFERENCE: dictionary_learning,
    SPARSIFY_TRAINER: sparsify,
    SAELENS_TRAINER: saelens,
}


def load(device: str, wanted: Iterable[str] | None = None) -> tuple[list[Peer], dict[str, str]]:
    """The peers that are there, and every name with its version or, "absent: ...", what is missing."""
    peers, found = [], {}
    for name in PEERS if wanted is None else wanted:
        try:
            peers.append(PEERS[name](device))
        except Exception as error:  # not there, not compiled, or it does not import here
            found[name] = f"absent: {one_line(error)}"
        else:
            found[name] = peers[-1].version
    return peers, found


if __name__ == "__main__":
    for name, version in load("cuda" if torch.cuda.is_available() else "cpu")[1].items():
        print(f"{name}: {version}")
