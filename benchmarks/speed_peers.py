"""What soft_topk and hard_topk are timed beside, each under one signature.

    python -m benchmarks.speed_peers               # what is there, and why the rest is not
    python -m benchmarks.speed_peers --build 90    # compile CUB's kernels ahead, for compute capability 9.0

    torch.topk(64), torch.sort, reference          always there
    torch.compile(reference)                       in float32 at one length: each takes half a minute
    LapSum C++ (CPU), LapSum CUDA, LapSum PyTorch  SOFTTOPK_PEER_LAPSUM, as in implementations.py
    CUB                                            SOFTTOPK_PEER_CUB: a checkout of
                                                   https://github.com/NVIDIA/cccl, or the folder that
                                                   --build filled from one
    FlashInfer                                     by import

Hard selections are given k = 64 for every row, which CUB knows when it is compiled.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import implementations
from benchmarks.bars import LENGTHS, TOPK
from benchmarks.environment import ROOT
from benchmarks.features import one_line
from softtopk.backends import reference

K = 64
CUB = "SOFTTOPK_PEER_CUB"
CUB_TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16"}
BUILT = ROOT / "build" / "peers" / "cub"
COMPILED_LENGTH = 16384


@dataclass
class Problem:
    """One call's tensors: x, v (rows, n), k (rows,) float32."""

    x: Tensor
    k: Tensor
    alpha: float
    v: Tensor


@dataclass
class Peer:
    """`calls` gives, for a problem, the functions to time by what they do: "top-k" (a hard selection), or
    the "forward", "backward", "forward+backward" of soft_topk. It raises where the peer cannot do it."""

    name: str
    version: str
    calls: Callable[[Problem], dict[str, Callable[[], object]]]
    check: Callable[[Problem], Tensor] | None = None  # values (rows, K) in any order of a hard selection


def torch_topk(device: str) -> Peer:
    return Peer(TOPK, torch.__version__, lambda p: {"top-k": partial(torch.topk, p.x, K)})


def torch_sort(device: str) -> Peer:
    return Peer("torch.sort", torch.__version__, lambda p: {"top-k": partial(torch.sort, p.x)})


def soft(function: Callable, problem: Problem) -> dict[str, Callable[[], object]]:
    """The three calls of a differentiable p = function(x, k, alpha), with gradients to x and k.

    On copies, since LapSum's PyTorch writes to x when it is derived, so that it can be derived only once:
    of its backward alone there is no time.
    """
    x, k, v = (t.detach().clone() for t in (problem.x, problem.k, problem.v))
    leaves = (x.requires_grad_(), k.requires_grad_())

    def forward():
        with torch.no_grad():
            return function(x, k, problem.alpha)

    @functools.cache
    def p() -> Tensor:
        return function(x, k, problem.alpha)

    def backward():
        return torch.autograd.grad(p(), leaves, v, retain_graph=True)

    def both():
        return torch.autograd.grad(function(x, k, problem.alpha), leaves, v)

    return {"forward": forward, "backward": backward, "forward+backward": both}


def plain(device: str) -> Peer:
    ours = implementations.ours("reference")
    return Peer("reference", ours.version, partial(soft, ours.function))


def compiled(device: str) -> Peer:
    forward = torch.compile(reference.soft_topk_forward, fullgraph=True, dynamic=False)

    def calls(problem: Problem):
        if problem.x.shape[1] != COMPILED_LENGTH or problem.x.dtype != torch.float32:
            raise implementations.Absent(f"compiled for float32 rows of {COMPILED_LENGTH} only")
        return {"forward": partial(forward, problem.x, problem.k, problem.alpha)}

    return Peer("torch.compile(reference)", torch.__version__, calls)


def lapsum(name: str, device: str) -> Peer:
    found = implementations.load(name, device)
    return Peer(found.name, found.version, partial(soft, found.function))


def flashinfer(device: str) -> Peer:
    module = importlib.import_module("flashinfer")

    def values(problem: Problem) -> Tensor:
        return module.top_k(problem.x, K)[0]

    return Peer(
        "FlashInfer",
        importlib.metadata.version("flashinfer-python"),
        lambda problem: {"top-k": partial(module.top_k, problem.x, K)},
        values,
    )


def capability() -> str:
    return "{}{}".format(*torch.cuda.get_device_capability())


def cub_library(root: Path, dtype: torch.dtype, n: int, architecture: str) -> Path:
    """The compiled shim for one dtype and length: from `root` itself, or made from the headers there."""
    name = f"{str(dtype).removeprefix('torch.')}-{n}-sm{architecture}.so"
    if (root / name).exists():
        return root / name
    nvcc = shutil.which("nvcc")
    includes = [root / "cub", root / "thrust", root / "libcudacxx" / "include"]
    if missing := [folder for folder in includes if not folder.is_dir()]:
        raise ImportError(f"{root} has neither {name} nor {missing[0].name}")
    if nvcc is None:
        raise ImportError("nvcc is not on the PATH")
    BUILT.mkdir(parents=True, exist_ok=True)
    target = BUILT / name
    source = ROOT / "benchmarks" / "cub_topk.cu"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += [f"-I{folder}" for folder in includes]
        command += [f"-DPEER_N={n}", f"-DPEER_K={K}", f"-DPEER_TYPE={CUB_TYPES[dtype]}"]
        done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr.strip()[-400:]}")
    return target


def cub(device: str) -> Peer:
    root = implementations.folder(CUB)
    loaded: dict[Path, ctypes.CDLL] = {}

    def library(dtype: torch.dtype, n: int) -> ctypes.CDLL:
        path = cub_library(root, dtype, n, capability())
        if path not in loaded:
            loaded[path] = ctypes.CDLL(str(path))
        return loaded[path]

    def call(problem: Problem) -> Callable[[], Tensor]:
        x = problem.x
        rows, n = x.shape
        top_k = library(x.dtype, n).top_k
        values, indices = x.new_empty((rows, K)), x.new_empty((rows, K), dtype=torch.int32)
        stream = torch.cuda.current_stream().cuda_stream
        size = ctypes.c_size_t(0)
        outputs = [ctypes.c_void_p(t.data_ptr()) for t in (x, values, indices)]
        rest = (ctypes.byref(size), ctypes.c_int64(rows), ctypes.c_void_p(stream))

        def launch(scratch: int | None) -> None:
            if error := top_k(*outputs, ctypes.c_void_p(scratch), *rest):
                raise RuntimeError(f"CUDA error {error}")

        launch(None)
        scratch = x.new_empty((max(size.value, 1),), dtype=torch.uint8)

        def run() -> Tensor:
            launch(scratch.data_ptr())
            return values

        return run

    version = library(torch.float32, LENGTHS[0]).version()
    name = f"CUB {version // 100000}.{version // 100 % 1000}"
    return Peer(name, str(version), lambda p: {"top-k": call(p)}, lambda p: call(p)())


PEERS: dict[str, Callable[[str], Peer]] = {
    TOPK: torch_topk,
    "torch.sort": torch_sort,
    "reference": plain,
    "torch.compile(reference)": compiled,
    "LapSum native": partial(lapsum, "LapSum C++"),
    "LapSum PyTorch": partial(lapsum, "LapSum PyTorch"),
    "CUB": cub,
    "FlashInfer": flashinfer,
}
GPU_ONLY = ("CUB", "FlashInfer")
CHEAP = (TOPK, "torch.sort")


def load(device: str, wanted: list[str] | None = None) -> tuple[list[Peer], dict[str, str]]:
    """The peers that are there, and every name with its version or, "absent: ...", what is missing."""
    peers, found = [], {}
    for name in PEERS if wanted is None else wanted:
        if device == "cpu" and name in GPU_ONLY:
            continue
        try:
            peer = PEERS[name](device)
        except Exception as error:  # not installed, not compiled, or it does not import here
            found[name] = f"absent: {one_line(error)}"
            continue
        peers.append(peer)
        found[peer.name] = peer.version
    return peers, found


def wrong(peer: Peer, problem: Problem) -> str | None:
    """What a hard selection got wrong on the first and last rows, None where it is right or not checked."""
    if peer.check is None:
        return None
    got = peer.check(problem)
    pick = [0, -1]
    want = problem.x[pick].topk(K).values
    if not torch.equal(got[pick].float().sort(descending=True).values, want.float()):
        return f"{peer.name} selects other values than torch.topk"
    return None


def build(architecture: str) -> None:
    root = implementations.folder(CUB)
    for dtype in (torch.float32, torch.bfloat16):
        for n in LENGTHS:
            print(cub_library(root, dtype, n, architecture), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--build", metavar="CAPABILITY", help=f"compile into {BUILT.relative_to(ROOT)}, stop")
    args = parser.parse_args()
    if args.build:
        return build(args.build)
    for name, version in load(args.device)[1].items():
        print(f"{name}: {version}")


if __name__ == "__main__":
    main()
