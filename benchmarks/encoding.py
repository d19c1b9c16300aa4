"""Encoding throughput: tokens a second of softsae's encoders by the size of the dictionary.

    python -m benchmarks.encoding                                  # on the GPU if there is one
    python -m benchmarks.encoding --widths 768 --lengths 65536     # a part; the rest of the file is kept
    python -m benchmarks.encoding --no-shards
    python -m benchmarks.encoding --quick --device cpu             # small sizes: whether everything runs

TopK and SoftSAE with a bottleneck estimator, `encode` and `decode(encode(x))` as a user calls them, sparse
and dense, in bfloat16 on a GPU and float32 on a CPU; beside torch (torch.topk of relu(x W^T + b), then
F.embedding_bag) and the product x W^T + b alone. "shards" is softsae.encode_source, from a folder of
activations on disk to one of codes. Codes and reconstructions are compared with float64 before they are
timed. A time is that of one call in a row of calls, of the slower of host and device, on activations taken in
turn; a dictionary stays where it is, in the L2 cache if it fits. On a CPU all that is timed takes turns.

benchmarks/results/encoding-DEVICE.json holds the rows: model, path, op, dtype, rows (tokens of a call), n, d,
k; ms (of a call; of all shards, in the faster of two passes), tokens_per_s, active (latents of a token),
fraction (time of the product alone over ms), peak_bytes (without weights and activations), max_error, commit;
of shards also tokens, bytes_read and bytes_written; error where it could not be measured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.encoding_data import (
    Weights,
    autoencoder,
    draw_activations,
    draw_weights,
    write_shards,
)
from benchmarks.environment import RESULTS, commit, device_label, environment, write
from benchmarks.features import one_line
from benchmarks.sparse_bars import ERRORS
from benchmarks.sparse_dense import peak_bytes
from benchmarks.sparse_measure import PEER_ERROR, picked, worst
from benchmarks.timing import clock_ms, event_ms, row_of_calls_ms
from softsae import SparseAutoencoder, encode_source
from softtopk import SparseCode

K = 64
WIDTHS = (768, 2304)
LENGTHS = {"cuda": (4096, 16384, 65536, 131072, 262144), "cpu": (4096, 16384, 65536)}
ROWS = {"cuda": 4096, "cpu": 256}  # tokens of a call
SHARD_BATCHES = 8  # of so many tokens lie on disk, in two shards
PASSES = 2  # over the shards, of which the faster counts
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
QUICK = {"widths": [64], "lengths": [256, 1024], "rows": 32, "k": 8}
COPIES = 4  # of activations, taken in turn
BUDGET_S = {"cuda": 0.08, "cpu": 0.4}  # seconds a measurement, about
ROUNDS = (5, 30)  # on a CPU, at least and at most
TOPK, SOFTSAE, TORCH = "TopK", "SoftSAE, bottleneck estimator", "torch"
ARCHITECTURES = {TOPK: "topk", SOFTSAE: "softsae"}
ENCODE, BOTH, SHARDS = "encode", "encode + decode", "shards"
OPS = (ENCODE, BOTH, SHARDS)
SPARSE, DENSE = "sparse", "dense"
PRODUCT, TORCH_TOPK = "the product alone", "relu + torch.topk"
Call = Callable[[], object]
Case = tuple[dict, list[Call]]  # a row, and the calls whose time it lacks
KEY = ("model", "path", "op", "dtype", "rows", "n", "d", "k")


@dataclass(frozen=True)
class Size:
    """Of what is measured: `rows` tokens a call."""

    rows: int
    n: int
    d: int
    k: int
    dtype: torch.dtype
    device: str

    def row(self, model: str, path: str, op: str, **found) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        where = {"dtype": dtype, "rows": self.rows, "n": self.n, "d": self.d, "k": self.k}
        return {"model": model, "path": path, "op": op, **where, **found}


@dataclass(frozen=True)
class Exact:
    """float64 activations relu(x W^T + b) (r, n) of some rows of x, and what decodes them."""

    rows: list[int]
    latents: Tensor
    weights: Weights

    @classmethod
    def of(cls, x: Tensor, weights: Weights) -> Exact:
        rows = picked(x)
        wide = x[rows].double() - weights.b_dec.double()
        pre = torch.addmm(weights.b_enc.double(), wide, weights.W_enc.double().T)
        return cls(rows, pre.relu_(), weights)

    def code_error(self, latents: Tensor, budgets: Tensor) -> float:
        """The largest error of latents (B, n), over the largest activation of the row: of what stands at a
        place, and of the entries by size beside as many of the largest activations.

        Raises RuntimeError where a row has not as many entries as its budget says; one more or fewer may be
        the budget's rounding.
        """
        got, want = latents[self.rows].double(), self.latents
        counts = (got > 0).sum(1)
        wanted = torch.minimum(budgets[self.rows].double(), (want > 0).sum(1))
        if ((counts - wanted).abs() > 1).any():
            raise RuntimeError(f"{counts.tolist()} entries in place of {wanted.tolist()}")
        places = torch.where(got > 0, got - want, 0).abs().amax(1)
        most = int(counts.max())
        among = torch.arange(most, device=got.device) < counts.unsqueeze(1)
        order = torch.where(among, got.topk(most).values - want.topk(most).values, 0).abs().amax(1)
        return worst(torch.maximum(places, order) / want.amax(1))

    def decoding_error(self, latents: Tensor, x_hat: Tensor) -> float:
        """Of a reconstruction (B, d) from latents (B, n), over the largest coordinate of the row."""
        wide = latents[self.rows].double()
        want = torch.addmm(self.weights.b_dec.double(), wide, self.weights.W_dec.double())
        return worst((x_hat[self.rows].double() - want).abs() / want.abs().amax(1, keepdim=True))


def times_ms(cases: list[list[Call]], device: str) -> list[float]:
    """Milliseconds of one of each case's calls, which are taken in turn.

    On a GPU in a row of them, of the slower of host and device. On a CPU the median of rounds in which every
    case has its turn, so that what else the machine does is the same for all.
    """
    if device != "cpu":
        return [row_ms(calls) for calls in cases]
    turns = [itertools.cycle(calls) for calls in cases]
    first = [clock_ms(next(turn)) for turn in turns]
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(BUDGET_S[device] * len(cases) * 1e3 / sum(first))))
    times = [[clock_ms(next(turn)) for turn in turns] for _ in range(rounds)]
    return [statistics.median(case) for case in zip(*times, strict=True)]


def row_ms(calls: list[Call]) -> float:
    calls[0]()
    once = event_ms(calls[:1])[0]
    count = max(2, min(20, int(BUDGET_S["cuda"] * 1e3 / (4 * once))))
    return row_of_calls_ms(list(itertools.islice(itertools.cycle(calls), count)), repeats=3)


def prepared(size: Size, row: dict, call: Callable[[Tensor], object], xs: list[Tensor]) -> Case:
    """The row with the memory of a call, and the calls to be timed."""
    calls = [functools.partial(call, x) for x in xs]
    return {**row, "peak_bytes": peak_bytes(calls[0], size.device)}, calls


def dense_of(latents: Tensor | SparseCode) -> Tensor:
    return latents.to_dense() if isinstance(latents, SparseCode) else latents


def wrong(row: dict) -> str | None:
    """Why the time of a row says nothing, None where it is right."""
    if row.get("error"):
        return row["error"]
    allowed = PEER_ERROR if row["model"] == TORCH else ERRORS[row["dtype"]]
    error = row.get("max_error")
    return None if error is None or error <= allowed else f"error {error:.1e} > {allowed:.1e}"


def ours(size: Size, model: str, path: str, op: str, sae, xs: list[Tensor], exact: Exact) -> Case:
    sparse = path == SPARSE

    def encode(x: Tensor) -> Tensor | SparseCode:
        return sae.encode(x, sparse=sparse)

    def both(x: Tensor) -> Tensor:
        return sae.decode(sae.encode(x, sparse=sparse))

    latents = dense_of(encode(xs[0]))
    if op == ENCODE:
        error = exact.code_error(latents, (sae(xs[0]).k_hat + 0.5).floor())
    else:
        error = exact.decoding_error(latents, both(xs[0]))
    active = round((latents > 0).sum(1).double().mean().item(), 2)
    row = size.row(model, path, op, active=active, max_error=error)
    del latents
    return prepared(size, row, encode if op == ENCODE else both, xs)


def torchs(size: Size, path: str, op: str, weights: Weights, xs: list[Tensor], exact: Exact) -> Case:
    W_enc, b_enc, W_dec, b_dec = weights

    def product(x: Tensor) -> Tensor:
        return F.linear(x - b_dec, W_enc, b_enc)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(product(x)).topk(size.k)

    def both(x: Tensor) -> Tensor:
        values, indices = encode(x)
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec

    if path == PRODUCT:
        return prepared(size, size.row(TORCH, path, op), product, xs)
    values, indices = encode(xs[0])
    latents = torch.zeros(len(values), size.n, dtype=size.dtype, device=values.device)
    latents.scatter_(1, indices, values)
    if op == ENCODE:
        error = exact.code_error(latents, torch.full(latents.shape[:1], size.k, device=latents.device))
    else:
        error = exact.decoding_error(latents, both(xs[0]))
    row = size.row(TORCH, path, op, active=size.k, max_error=error)
    del latents
    return prepared(size, row, encode if op == ENCODE else both, xs)


def shards(size: Size, model: str, sae: SparseAutoencoder, folder: Path) -> Case:
    """encode_source from a folder to another beside it."""
    cuda = size.device != "cpu"
    stored = str(size.dtype).removeprefix("torch.")
    times = []
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        for number in range(PASSES):
            started = time.perf_counter()
            out = Path(place) / f"codes-{number}"
            encode_source(sae, folder, out, batch_size=size.rows, dtype=stored)  # ends with the host's copies
            times.append((time.perf_counter() - started) * 1e3)
        manifest = json.loads((out / "manifest.json").read_text())
        written = sum(file.stat().st_size for file in out.iterdir())
    ms = min(times)
    tokens, entries = manifest["rows"], sum(shard["entries"] for shard in manifest["shards"])
    row = size.row(
        *(model, SPARSE, SHARDS),
        **{"active": round(entries / tokens, 2), "ms": round(ms, 3)},
        **{"tokens_per_s": round(tokens / ms * 1e3), "tokens": tokens},
        **{"peak_bytes": torch.cuda.max_memory_allocated() - held if cuda else None},
        **{"bytes_read": tokens * size.d * size.dtype.itemsize, "bytes_written": written},
    )
    return row, []


def tried(measure: Callable[..., Case], size: Size, model: str, path: str, op: str, *arguments) -> Case:
    """What it gives, or a row that says why there is none."""
    try:
        return measure(size, *arguments)
    except Exception as error:
        return size.row(model, path, op, ms=None, error=one_line(error)), []
    finally:
        gc.collect()


@torch.no_grad()
def rows_of(size: Size, weights: Weights, folder: Path | None) -> list[dict]:
    """Everything at one size; the folder has activations to stream."""
    xs = [draw_activations(size.rows, size.k, weights, seed) for seed in range(COPIES)]
    exact = Exact.of(xs[0], weights)
    of_torch = (weights, xs, exact)
    found = [tried(torchs, size, TORCH, PRODUCT, ENCODE, PRODUCT, ENCODE, *of_torch)]
    for op in (ENCODE, BOTH):
        found.append(tried(torchs, size, TORCH, TORCH_TOPK, op, TORCH_TOPK, op, *of_torch))
    for model, architecture in ARCHITECTURES.items():
        sae = autoencoder(architecture, size.k, weights)
        for path, op in itertools.product((SPARSE, DENSE), (ENCODE, BOTH)):
            found.append(tried(ours, size, model, path, op, model, path, op, sae, xs, exact))
        if folder is not None:
            found.append(tried(shards, size, model, SPARSE, SHARDS, model, sae, folder))
    cases = [(row, calls) for row, calls in found if calls]
    for (row, _), ms in zip(cases, times_ms([calls for _, calls in cases], size.device), strict=True):
        row |= {"ms": round(ms, 5), "tokens_per_s": round(size.rows / ms * 1e3)}
        if (product := found[0][0]["ms"]) is not None:
            row["fraction"] = round(product / ms, 4)
    return [row for row, _ in found]


def key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def position(row: dict) -> tuple:
    """Of a row in the file and in the table."""
    models = (TORCH, *ARCHITECTURES)
    return row["d"], OPS.index(row["op"]), models.index(row["model"]), row["path"], row["n"], row["rows"]


def update(path: Path, new: list[dict], remark: str | None = None) -> None:
    """Merge rows into a file; rows keep the commit at which they were measured."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {key(row): row for row in [*old, *new]}
    machine = environment() | ({"remark": remark} if remark else {})
    write(path, sorted(rows.values(), key=position), environment=machine)


def line(row: dict) -> str:
    words = ["n={n:<7} d={d:<5} {op:16} {model:30} {path:18}".format(**row)]
    if row["ms"] is None:
        return " ".join([*words, row["error"]])
    words.append(f"{row['ms']:10.4f} ms {row['tokens_per_s']:12,} tokens/s")
    if "fraction" in row:
        words.append(f"{row['fraction']:6.1%} of the product")
    if row["peak_bytes"] is not None:
        words.append(f"{row['peak_bytes'] / 2**20:,.0f} MiB")
    if row.get("max_error") is not None:
        words.append(f"error {row['max_error']:.1e}")
    return " ".join([*words, *(["WRONG"] if wrong(row) else [])])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", nargs="+", type=int, help="d; default: 768 and 2304")
    parser.add_argument("--lengths", nargs="+", type=int, help="n; default: 4096 ... 262144, on a CPU 65536")
    parser.add_argument("--rows", type=int, help="tokens of a call; default: 4096, on a CPU 256")
    parser.add_argument("--k", type=int, help="default: 64")
    parser.add_argument("--no-shards", action="store_true", help="nothing from disk")
    parser.add_argument("--remark", help="what the machine was doing besides, for the file's environment")
    parser.add_argument("--quick", action="store_true", help="small sizes; the file goes to --out alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/encoding-DEVICE.json")
    args = parser.parse_args()
    kind = "cpu" if args.device == "cpu" else "cuda"
    usual = {"widths": WIDTHS, "lengths": LENGTHS[kind], "rows": ROWS[kind], "k": K}
    for name, value in (QUICK if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    path = args.out
    if path is None and not args.quick:
        path = RESULTS / f"encoding-{device_label(args.device)}.json"
    dtype, started = DTYPES[kind], time.perf_counter()
    rows: list[dict] = []
    at = commit()
    for d in args.widths:
        weights = draw_weights(max(args.lengths), d, dtype, args.device)
        with tempfile.TemporaryDirectory() as place:
            folder = None
            if not args.no_shards:
                first = weights.first(min(args.lengths))
                batches = [draw_activations(args.rows, args.k, first, i) for i in range(SHARD_BATCHES)]
                folder = write_shards(Path(place) / "activations", batches, SHARD_BATCHES // 2 * args.rows)
                del batches
            for n in sorted(args.lengths):
                size = Size(args.rows, n, d, args.k, dtype, args.device)
                for row in rows_of(size, weights.first(n), folder):
                    rows.append({**row, "commit": at})
                    print(line(row), flush=True)
                if kind == "cuda":
                    torch.cuda.empty_cache()
        if path is not None:
            update(path, rows, args.remark)
    if errors := [row["error"] for row in rows if row["ms"] is None]:
        print(f"{len(errors)} rows could not be measured, the first: {errors[0]}")
    print(f"{len(rows)} rows, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
