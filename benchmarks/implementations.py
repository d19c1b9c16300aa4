"""Implementations of soft top-k under one signature: our backends and, where they are found, others'.

An implementation's `function` is (x, k, alpha, dim) -> p: the public call of that implementation and
nothing besides. What has to be written differently is (k as a column, one whole number for all
rows); what it cannot do is left to fail. Nothing of the others is copied: they are imported, or run
from the folder that an environment variable names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import softtopk
from benchmarks.environment import commit


class Absent(Exception):
    """The implementation does not offer this at all; the message says what is missing."""


@dataclass
class Implementation:
    name: str
    function: Callable  # (x, k, alpha, dim) -> p; k, alpha: numbers, or tensors of x's shape without dim
    version: str
    source: str
    operator: str = "LapSum"  # the definition of p; errors of p have a meaning only for LapSum
    sums_to_k: bool = True  # whether the definition asks for sum(p) = k
    log: Callable | None = None  # (x, k, alpha, complement) -> log p or log(1 - p) along the last dim
    number_alpha: Callable | None = None  # function, where that makes a number alpha a tensor, without it
    whole_k: bool = False  # k is one Python integer for all rows
    max_n: int | None = None  # the longest row that it can do in reasonable time and memory
    import_error: ImportError | None = None  # why it cannot be imported as it is without CUDA

    @property
    def is_lapsum(self) -> bool:
        return self.operator == "LapSum"


def ours(backend: str) -> Implementation:
    def function(x, k, alpha, dim=-1):
        return softtopk.soft_topk(x, k, alpha, dim=dim, backend=backend)

    def log(x, k, alpha, complement=False):
        return softtopk.log_soft_topk(x, k, alpha, complement=complement, backend=backend)

    return Implementation(
        name=f"softtopk {backend}",
        function=function,
        version=f"{softtopk.__version__}, commit {commit()}",
        source="this repository",
        log=log,
    )


def folder(variable: str) -> Path:
    """The folder that an environment variable names; ImportError where it names none."""
    value = os.environ.get(variable)
    if not value:
        raise ImportError(f"{variable} is not set")
    if not Path(value).is_dir():
        raise ImportError(f"{variable}={value} is no folder")
    return Path(value).resolve()


def version_of(variable: str) -> str:
    """The commit of the checkout in that folder, or what VARIABLE_COMMIT says."""
    root = folder(variable)
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--show-toplevel", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
    ).stdout.split()
    if len(found) == 2 and Path(found[0]).resolve() == root:
        return f"commit {found[1]}"
    named = os.environ.get(f"{variable}_COMMIT")
    return f"commit {named}" if named else "unknown"


def column(k, x: Tensor, dim: int) -> Tensor:
    """k as a tensor of x's shape with 1 along dim."""
    if not isinstance(k, Tensor):
        k = torch.full([*x.movedim(dim, -1).shape[:-1]], float(k), dtype=x.dtype, device=x.device)
    return k.unsqueeze(dim)


def scalar(alpha) -> Tensor:
    """alpha as a tensor; a number as one of no dimension on the host, which nothing has to wait for."""
    return alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=torch.float64)


LAPSUM = "SOFTTOPK_PEER_LAPSUM"


def lapsum_native(device: str) -> Implementation:
    """The C++ extension (on a GPU the CUDA one), compiled by torch from the sources as they lie there.

    The package imports its CUDA extension wherever it runs; without CUDA an empty module stands in
    for it, and the error of the import as it is is kept.
    """
    from torch.utils import cpp_extension

    package = folder(LAPSUM) / "lapsum"
    topk = package / "lapsum" / "topk"
    names = ("soft_topk", "log_soft_topk")

    def extension(kind: str, name: str) -> str:
        return f"lapsum.topk.extension.{name}_{kind}"

    sys.path.insert(0, str(package))
    for name in names:
        source = str(topk / "cpu" / f"{name}.cpp")
        sys.modules[extension("cpu", name)] = cpp_extension.load(f"{name}_cpu", [source])
    error = None
    try:
        module = importlib.import_module("lapsum.topk")
    except ImportError as raised:
        error = raised
        for name in names:
            if device == "cpu":
                loaded = ModuleType(extension("cuda", name))
            else:
                sources = [str(topk / "cuda" / f) for f in (f"{name}.cu", f"{name}_cuda.cpp")]
                flags = ["-O2", "--expt-relaxed-constexpr"]
                loaded = cpp_extension.load(f"{name}_cuda", sources, extra_cuda_cflags=flags)
            sys.modules[extension("cuda", name)] = loaded
        module = importlib.import_module("lapsum.topk")

    def log(x, k, alpha, complement=False):
        if complement:
            raise Absent("no log(1 - p)")
        return module.log_soft_topk(x, column(k, x, -1), scalar(alpha), dim=-1)

    def number_alpha(x, k, alpha, dim=-1):
        return module.soft_topk(x, column(k, x, dim), alpha, dim=dim)

    return Implementation(
        name="LapSum C++" if device == "cpu" else "LapSum CUDA",
        function=lambda x, k, alpha, dim=-1: number_alpha(x, k, scalar(alpha), dim),
        version=version_of(LAPSUM),
        source="https://github.com/gmum/LapSum",
        log=log,
        number_alpha=number_alpha,
        import_error=error,
    )


def lapsum_pytorch(device: str) -> Implementation:
    """The plain PyTorch functions that its authors publish as notebooks."""
    notebooks = folder(LAPSUM) / "tutorial_notebooks"
    soft_top_k = defined_in(notebooks / "soft_topk.ipynb", "soft_top_k")
    log_soft_top_k = defined_in(notebooks / "log-soft_topk.ipynb", "log_soft_top_k")

    def number_alpha(x, k, alpha, dim=-1):
        if dim % x.dim() != x.dim() - 1:
            raise Absent("no dim")
        return soft_top_k(x, column(k, x, -1).squeeze(-1), alpha)

    def log(x, k, alpha, complement=False):
        if complement:
            raise Absent("no log(1 - p)")
        return log_soft_top_k(x, column(k, x, -1).squeeze(-1), scalar(alpha))

    return Implementation(
        name="LapSum PyTorch",
        function=lambda x, k, alpha, dim=-1: number_alpha(x, k, scalar(alpha), dim),
        version=version_of(LAPSUM),
        source="https://github.com/gmum/LapSum",
        log=log,
        number_alpha=number_alpha,
    )


def defined_in(notebook: Path, name: str):
    """Run a notebook's cells up to the one that defines `name`, and return what it defines."""
    names: dict = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
        if name in names:
            return names[name]
    raise ImportError(f"{notebook.name} does not define {name}")


def entmax(device: str) -> Implementation:
    module = importlib.import_module("entmax")

    def function(x, k, alpha, dim=-1):
        if isinstance(alpha, Tensor):
            raise Absent("no scale")
        return module.budget_bisect(x / alpha, budget=column(k, x, dim), dim=dim)

    return Implementation(
        name="entmax",
        function=function,
        version=importlib.metadata.version("entmax"),
        source="https://github.com/deep-spin/entmax",
        operator="budget_bisect of x/alpha: the projection onto {0 <= p <= 1, sum(p) = k}",
    )


def softtorch(device: str) -> Implementation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba, which this operator does not use
        module = importlib.import_module("softtorch")

    def function(x, k, alpha, dim=-1):
        found = module.topk(x, k, dim=dim, softness=alpha, standardize=False)
        return found.indices.sum(dim % x.dim()).movedim(-1, dim)

    return Implementation(
        name="softtorch",
        function=function,
        version=importlib.metadata.version("softtorch"),
        source="https://github.com/a-paulus/softtorch",
        operator="the sum of the k soft indices of topk, default method (NeuralSort)",
        whole_k=True,
        max_n=512,
    )


DFTOPK = "SOFTTOPK_PEER_DFTOPK"


def dftopk(device: str) -> Implementation:
    sys.path.insert(0, str(folder(DFTOPK) / "torch"))
    module = importlib.import_module("deep_components.loss.two_stage.topk_loss")

    def function(x, k, alpha, dim=-1):
        if dim % x.dim() != 1:
            raise Absent("dim=1 alone")
        return torch.sigmoid(module.dftopk(x, k, alpha))

    return Implementation(
        name="DFTopK",
        function=function,
        version=version_of(DFTOPK),
        source="https://github.com/zhangzhen97/DFTOPK",
        operator="sigmoid((x - (x_[k] + x_[k+1])/2)/alpha); sum(p) = k is not asked for",
        sums_to_k=False,
        whole_k=True,
    )


PEERS = {
    "LapSum C++": lapsum_native,
    "LapSum PyTorch": lapsum_pytorch,
    "entmax": entmax,
    "softtorch": softtorch,
    "DFTopK": dftopk,
}


def names(device: str) -> list[str]:
    """Our backends that run on the device, and every peer, there or not."""
    backends = ("cpu", "reference") if device == "cpu" else ("cuda", "triton", "reference")
    there = softtopk.available_backends()
    return [f"softtopk {b}" for b in backends if there[b] is None] + list(PEERS)


def load(name: str, device: str) -> Implementation:
    """The implementation of that name; ImportError or what its own import raises where it is absent."""
    if name in PEERS:
        return PEERS[name](device)
    return ours(name.removeprefix("softtopk "))
