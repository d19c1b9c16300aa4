"""Measure tile sizes instead of taking the shipped ones: SOFTTOPK_AUTOTUNE=1 in the environment.

The first call for a pass, dtype and length class on a GPU times a few choices on its own arguments, so
let it be a representative one; the fastest is kept in `triton.json` under SOFTTOPK_CACHE_DIR, or
`softtopk` in the user's cache directory, and later processes read it there. A process never
changes a choice once made, because another tile would change the last bits of its results. Where
nothing can be timed, while a CUDA graph is captured or a function traced, the choice is the default.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.testing
from torch import Tensor

chosen: dict[str, tuple[int, ...]] = {}  # of this process


def enabled() -> bool:
    return os.environ.get("SOFTTOPK_AUTOTUNE") == "1"


def cache_file() -> Path:
    directory = os.environ.get("SOFTTOPK_CACHE_DIR")
    if directory:
        return Path(directory) / "triton.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softtopk" / "triton.json"


def load() -> dict[str, list[int]]:
    """The choices on file; none where it is not there or not readable."""
    try:
        stored = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def save(key: str, choice: tuple[int, ...]) -> None:
    """Add one to the file, which is replaced as a whole; a directory that cannot be written is no error."""
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(load() | {key: list(choice)}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text + "\n")
        os.replace(file.name, path)


def can_time(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing() and not torch.compiler.is_compiling()


def milliseconds(run: Callable[[], None]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def gpu_name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu"


def choose(
    what: tuple,
    x: Tensor,
    default: tuple[int, ...],
    choices: list[tuple[int, ...]],
    start: Callable[[tuple[int, ...]], None],
) -> tuple[int, ...]:
    """The choice for `what` on x's GPU: start(choice) runs the kernel once, and may be repeated."""
    key = "|".join(map(str, (gpu_name(x), triton.__version__, *what)))
    if key in chosen:
        return chosen[key]
    stored = load().get(key)
    if isinstance(stored, list) and tuple(stored) in choices:
        best = tuple(stored)
    elif can_time(x):
        best = min(choices, key=lambda choice: milliseconds(lambda: start(choice)))
        save(key, best)
    else:
        best = default
    chosen[key] = best
    return best
