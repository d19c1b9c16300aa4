"""Files: safetensors with a JSON header, written under a temporary name and renamed when complete.

The header names the format with a number. A field that is added to a configuration keeps the number: files
without it have its default, and the options of architectures other than a file's own are not read. A change
of what tensors or fields mean raises it, and files of another number are refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

HEADER = "softsae"


def write(path: Path, tensors: dict[str, Tensor], header: dict):
    """Tensors and a header that JSON can hold, as one file that is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(cpu, temporary, metadata={HEADER: json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, expected_format: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the header of a file written by `write` with header["format"] as expected.

    Raises FileNotFoundError, and ValueError for a file that is truncated or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, struct.error, OSError) as error:
        raise ValueError(f"{path} cannot be read, it is truncated or no safetensors file: {error}") from error
    try:
        header = json.loads(metadata.get(HEADER, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error
    found = header.get("format")
    if found != expected_format:
        raise ValueError(f"{path} is of format {found!r}, not {expected_format!r}")
    return tensors, header


def parse(path: Path, make: Callable[[], Any]):
    """make(), with an error that names the file where its header does not fit."""
    try:
        return make()
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds a configuration that is not ours: {error}") from error


def fill(path: Path, module: nn.Module, tensors: dict[str, Tensor]):
    """Load a module's whole state; raises ValueError for missing, unknown or misshapen tensors."""
    state = module.state_dict()
    if missing := sorted(state.keys() - tensors.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - state.keys()):
        raise ValueError(f"{path} holds unknown tensors: {', '.join(unknown)}")
    for name, value in state.items():
        if tensors[name].shape != value.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(value.shape)}"
            raise ValueError(f"{path} has {name} of shape {shapes}")
    module.load_state_dict(tensors)


def rng_state() -> dict[str, Tensor]:
    """The states of torch's global generators by name."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(tensors: dict[str, Tensor]):
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
