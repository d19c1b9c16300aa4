"""A whole training step: softsae's, beside the trainers of others, its estimated floor and its stages.

    python -m benchmarks.step                              # everything that is there, on the GPU
    python -m benchmarks.step --shapes 0 2 --ours "TopK" --peers
    python -m benchmarks.step --no-stages
    python -m benchmarks.step --quick --device cpu         # small shapes: whether everything runs

At the shapes of sparse_bars.STEP_SHAPES, numbered from 0: SoftSAE with the published (wide) and with a
bottleneck estimator and TopK, each on the sparse path, the dense one and the one that softsae chooses, with
bfloat16 products in a CUDA graph; peers of step_peers.py in float32 and with TF32 products, or in their own
precision. Batches are random and lie on the device. benchmarks/results/step-DEVICE.json holds the rows and
every bar with what was found. A row: trainer, implementation, path, precision, rows, d, n, k; ms (median of
blocks of steps), host_ms (until the host is free), peak_bytes, state_bytes (parameters, gradients, state of
the optimizer), beyond_bytes (the rest of the peak), floor_ms by part and fraction, stages (ms of kernels),
kernels, peers (name -> times as long), commit; error where it could not be measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import sparse_bars, sparse_measure, step_ours, step_peers, step_stages
from benchmarks.environment import RESULTS, commit, device_label, environment, write
from benchmarks.features import one_line
from benchmarks.sparse_bars import STEP_SHAPES

QUICK_SHAPES = ((64, 32, 512, 8), (32, 48, 1024, 4))
OURS = "softtopk"
WARM_UP, BLOCKS = 8, 5
PROFILED = 4  # steps
KERNELS_KEPT = 40
MATMUL = {"float32": "highest"}  # precision -> torch's of float32 products, else "high", which is TF32
Shape = tuple[int, int, int, int]


def draw_batches(shape: Shape, device: str, count: int = 4) -> list[Tensor]:
    rows, d = shape[:2]
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(rows, d, device=device, generator=generator) for _ in range(count)]


def timed(do: Callable[[int], object], device: str, count: int, blocks: int) -> tuple[float, float]:
    """Median milliseconds of a step over blocks of `count`, and those after which the host was free."""
    found, host = [], []
    for _ in range(blocks):
        synchronize(device)
        begin, end = (event(device) for _ in range(2))
        started = time.perf_counter()
        begin.record()
        do(count)
        host.append((time.perf_counter() - started) * 1e3 / count)
        end.record()
        synchronize(device)
        found.append(begin.elapsed_time(end) / count)
    return statistics.median(found), statistics.median(host)


class Clock:
    """A CUDA event's interface on the host."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Clock) -> float:
        return (other.at - self.at) * 1e3


def event(device: str):
    return Clock() if device == "cpu" else torch.cuda.Event(enable_timing=True)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """So that what is measured next has all of its memory to itself, cuBLAS's workspaces as well."""
    gc.collect()
    if device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def row_of(shape: Shape, trainer: str, implementation: str, path: str, precision: str, **found) -> dict:
    rows, d, n, k = shape
    return {
        **{"trainer": trainer, "implementation": implementation, "path": path, "precision": precision},
        **{"rows": rows, "d": d, "n": n, "k": k},
        **found,
    }


def key(row: dict) -> tuple:
    names = ("trainer", "implementation", "path", "precision", "rows", "d", "n", "k")
    return tuple(row[name] for name in names)


def ours(
    shape: Shape, trainer: str, path: str, precision: str, device: str, steps: int, bytes_per_s: float
) -> dict:
    batches = draw_batches(shape, device)
    held = 0 if device == "cpu" else torch.cuda.memory_allocated()
    run = step_ours.training(shape, trainer, path, precision, device, batches)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    step_ours.do_steps(run, batches, WARM_UP)
    ms, host_ms = timed(lambda count: step_ours.do_steps(run, batches, count), device, steps, BLOCKS)
    memory = step_ours.memory(run, held) if device != "cpu" else {}
    rows, d, n, k = shape
    parts = sparse_bars.step_floor_ms(rows, d, n, k, step_ours.hidden_units(trainer, n), bytes_per_s)
    floor = sum(parts.values())
    return row_of(
        *(shape, trainer, OURS, path, precision),
        **{"ms": round(ms, 5), "host_ms": round(host_ms, 5), "recorded": is_recorded(run)},
        **{"took": "sparse" if run.path.sparse else "dense", "max_active": run.path.max_active},
        **{"active": round(float(run.path.support.mean), 2), "skipped": float(run.path.support.skipped)},
        **memory,
        **{"floor_ms": round(floor, 5), "fraction": round(floor / ms, 4)},
        **{"floor_parts": {name: round(part, 5) for name, part in parts.items()}},
    )


def is_recorded(run) -> bool:
    """Whether the steps were replayed from a CUDA graph."""
    return getattr(run.run_step, "graph", None) is not None


def stages(shape: Shape, trainer: str, path: str, precision: str, ms: float) -> dict:
    """Of a training of its own, with markers between the stages; idle: what of ms no kernel ran."""
    batches = draw_batches(shape, "cuda")
    marker = step_stages.Marker(lambda: torch.cuda._sleep(1))
    with step_stages.staged(marker, "cuda"):
        run = step_ours.training(shape, trainer, path, precision, "cuda", batches)
        step_ours.do_steps(run, batches, WARM_UP)
        kernels = step_stages.profiled(lambda: step_ours.do_steps(run, batches, PROFILED))
    found = step_stages.by_stage(kernels, marker.marks, PROFILED)
    totals, by_kernel = step_stages.summary(found, PROFILED)
    idle = round(ms - sum(totals.values()), 5)
    return {"stages": totals, "idle_ms": idle, "kernels": by_kernel[:KERNELS_KEPT]}


def peer(which: step_peers.Peer, shape: Shape, precision: str, device: str, steps: int) -> dict:
    torch.set_float32_matmul_precision(MATMUL.get(precision, "high"))
    batches = draw_batches(shape, device)
    held = 0 if device == "cpu" else torch.cuda.memory_allocated()
    training = which.make(*shape, device)
    done = 1  # step 0 initialises more than a step does

    def do(count: int) -> None:
        nonlocal done
        for _ in range(count):
            # A copy: trainers may write to their batch. It is a thousandth of their step.
            training.update(done, batches[done % len(batches)].clone())
            done += 1

    do(1)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    once = timed(do, device, 1, 2)[0]
    count = max(1, min(steps, int(400 / once)))
    ms, host_ms = timed(do, device, count, 3)
    size = sum(p.numel() * p.element_size() for p in training.parameters) * 4
    memory = {}
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() - held
        memory = {"peak_bytes": peak, "state_bytes": size, "beyond_bytes": peak - size}
    found = {"ms": round(ms, 5), "host_ms": round(host_ms, 5), **memory}
    return row_of(shape, which.name, which.name, "", precision, **found)


def measured(row: Callable[[], dict], keys: dict, device: str) -> dict:
    """The row, or one that says why there is none."""
    try:
        return row()
    except Exception as error:
        return {**keys, "ms": None, "error": one_line(error)}
    finally:
        torch.set_float32_matmul_precision("highest")
        release(device)


def with_peers(rows: list[dict]) -> list[dict]:
    """Every row of ours with how many times as long the peers take at its shape."""
    of_shape: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["implementation"] != OURS and row["ms"] is not None:
            name = f"{row['trainer']}, {row['precision']}"
            of_shape.setdefault(tuple(row[at] for at in ("rows", "d", "n", "k")), {})[name] = row["ms"]
    found = []
    for row in rows:
        if row["implementation"] == OURS and row["ms"] is not None:
            beside = of_shape.get(tuple(row[at] for at in ("rows", "d", "n", "k")), {})
            row = {**row, "peers": {name: round(ms / row["ms"], 2) for name, ms in beside.items()}}
        found.append(row)
    return found


def position(row: dict) -> tuple:
    """Of a row in the file: ours first, by shape."""
    return row["implementation"] != OURS, row["n"] * row["d"], *map(str, key(row))


def update(path: Path, device: str, new: list[dict], peers: dict[str, str]) -> list[dict]:
    """Merge rows into a file; rows keep the commit at which they were measured."""
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "peers": {}}
    rows = {key(row): row for row in old["rows"]}
    for row in new:
        earlier = rows.get(key(row), {})
        kept = {name: earlier[name] for name in ("stages", "idle_ms", "kernels") if name in earlier}
        rows[key(row)] = {**(kept if "stages" not in row else {}), **row}
    order = sorted(
        rows.values(), key=lambda r: (r["implementation"] != OURS, r["n"] * r["d"], *map(str, key(r)))
    )
    order = with_peers(order)
    bars = sparse_bars.step_verdicts(order) if device != "cpu" else []
    known = {name: text for name, text in old.get("peers", {}).items() if name not in peers}
    write(path, order, peers=known | peers, bars=[bar._asdict() for bar in bars])
    return order


def line(row: dict) -> str:
    where = "B={rows} d={d} n={n} k={k}".format(**row)
    words = [f"{where:34} {row['trainer']:30} {row['path']:7} {row['precision']:8}"]
    if row["ms"] is None:
        return " ".join([*words, row["error"]])
    words.append(f"{row['ms']:9.4f} ms, host {row['host_ms']:.4f}")
    if "took" in row:
        words.append(f"{row['fraction']:.1%} of the floor, {row['took']}, recorded {row['recorded']},")
        words.append(f"{row['active']} active, {row['skipped']:.0f} skipped")
    if "beyond_bytes" in row:
        words.append(f"peak {row['peak_bytes'] / 2**20:.0f} MiB, beyond {row['beyond_bytes'] / 2**20:.0f}")
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", type=int, help="default: all")
    parser.add_argument("--ours", nargs="*", choices=step_ours.TRAINERS, default=step_ours.TRAINERS)
    parser.add_argument("--paths", nargs="+", choices=step_ours.PATHS, default=step_ours.PATHS)
    parser.add_argument("--precisions", nargs="+", choices=sparse_bars.DTYPES, default=["bfloat16"])
    parser.add_argument("--peers", nargs="*", choices=step_peers.PEERS, default=list(step_peers.PEERS))
    parser.add_argument("--steps", type=int, default=20, help="in a block, of which there are five")
    parser.add_argument("--no-stages", action="store_true", help="do not profile")
    parser.add_argument("--quick", action="store_true", help="small shapes; the file goes to --out alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/step-DEVICE.json")
    args = parser.parse_args()
    path = args.out
    if path is None and not args.quick:
        path = RESULTS / f"step-{device_label(args.device)}.json"
    shapes = QUICK_SHAPES if args.quick else STEP_SHAPES
    shapes = [shapes[i] for i in args.shapes or range(len(shapes))]
    peers, versions = step_peers.load(args.device, args.peers)
    print("\n".join(f"{name}: {version}" for name, version in versions.items()))
    bytes_per_s = sparse_measure.bandwidth(args.device)
    steps = 2 if args.quick else args.steps
    rows: list[dict] = []
    started = time.perf_counter()

    def keep(row: dict) -> dict:
        rows.append({**row, "commit": commit()})
        print(line(row), flush=True)
        return rows[-1]

    for shape in shapes:
        for trainer in args.ours:
            for precision in args.precisions:
                for name in args.paths:
                    at = (shape, trainer, name, precision)
                    keys = row_of(shape, trainer, OURS, name, precision)
                    call = lambda at=at: ours(*at, args.device, steps, bytes_per_s)  # noqa: E731
                    row = keep(measured(call, keys, args.device))
                    if args.no_stages or args.device == "cpu" or name == "auto" or row["ms"] is None:
                        continue
                    found = measured(lambda at=at, ms=row["ms"]: stages(*at, ms), {}, args.device)
                    if "error" in found:
                        found = {"stages_error": found["error"]}
                    row |= found
                    print("  ", row.get("stages", found), flush=True)
        for which in peers:
            for precision in which.precisions:
                keys = row_of(shape, which.name, which.name, "", precision)
                at = (which, shape, precision, args.device, steps)
                keep(measured(lambda at=at: peer(*at), keys, args.device))
        if path is not None:
            update(path, args.device, rows, versions)
    if args.device != "cpu":
        words = {True: "met  ", False: "UNMET"}
        for bar in sparse_bars.step_verdicts(rows):
            print(f"{words[bar.met]} {bar.of}: {bar.asked}, {bar.found}")
    print(f"{time.perf_counter() - started:.0f} s; at {environment()['commit']}")


if __name__ == "__main__":
    main()
