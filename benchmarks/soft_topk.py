"""Time soft_topk forward and backward beside the memory floor, torch.topk and torch.sort.

    python -m benchmarks.soft_topk                 # on the GPU if there is one: 1 GiB of float32 per shape
    python -m benchmarks.soft_topk --device cpu    # smaller shapes

The floor of the forward is a copy of x (read x, write p), of the backward one and a half copies
(read x and v, write grad_x), measured in the same run. Every result is compared with the float64
oracle on some of its rows before it is timed. Rows of the result file: op, pass, backend, dtype,
rows, n, k, alpha, distribution, ms, floor_ms, fraction (floor / ms), max_error (of p on the checked
rows; of grad_x relative to its row's largest), peers (name -> ms).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

import softtopk
from benchmarks.environment import RESULTS, device_label, write
from benchmarks.timing import median_ms
from softtopk import dispatch
from tests.accuracy import oracle
from tests.cases import FAMILIES, make

GPU_SHAPES = ((65536, 4096), (16384, 16384), (8192, 32768), (4096, 65536), (2048, 131072))
CPU_SHAPES = ((256, 4096), (64, 16384), (16, 65536))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def large(distribution: str, rows: int, n: int, device: str) -> torch.Tensor:
    """Rows of a family of tests/cases.py; the large random ones are drawn on the device."""
    if distribution == "relu":
        return torch.randn(rows, n, device=device, generator=torch.Generator(device).manual_seed(0)).relu_()
    return make(distribution, 64, n).repeat(-(-rows // 64), 1)[:rows].to(device)


def errors(kernels, x, k, alpha, v) -> tuple[float, float]:
    """max|p - oracle| and max|grad_x - oracle| / max|grad_x| on the first and last rows."""
    pick = torch.tensor([0, 1, x.shape[0] - 2, x.shape[0] - 1], device=x.device)
    p, solution = kernels.soft_topk_forward(x, k, alpha, True)
    grad_x, *_ = kernels.soft_topk_backward(x, solution, alpha, v, True)
    want = oracle(x[pick], k[pick], alpha, v[pick])
    error_p = (p[pick].double().cpu() - want.p).abs().max().item()
    scale = want.grad_x.abs().amax(1, keepdim=True).clamp(min=1e-30 / alpha)
    return error_p, ((grad_x[pick].double().cpu() - want.grad_x).abs() / scale).max().item()


def measure(rows: int, n: int, dtype: str, alphas, distribution: str, backends, device: str) -> list[dict]:
    x = large(distribution, rows, n, device).to(DTYPES[dtype])
    v = torch.randn(rows, n, device=device).to(DTYPES[dtype])
    k = torch.randint(
        20, 121, (rows,), device=device, generator=torch.Generator(device).manual_seed(1)
    ).float()
    copy = median_ms(partial(torch.empty_like(x).copy_, x), device)
    peers = {"torch.topk(64)": median_ms(partial(torch.topk, x, 64), device, most=10)}
    try:
        peers["torch.sort"] = median_ms(partial(torch.sort, x), device, most=5)
    except torch.OutOfMemoryError:
        pass
    found = []
    for backend in backends:
        kernels = dispatch.module(backend)
        for alpha in alphas:
            error_p, error_x = errors(kernels, x, k, alpha, v)
            _, solution = kernels.soft_topk_forward(x, k, alpha, True)
            forward = median_ms(partial(kernels.soft_topk_forward, x, k, alpha, True), device)
            backward = median_ms(partial(kernels.soft_topk_backward, x, solution, alpha, v, True), device)
            shared = dict(
                backend=backend,
                dtype=dtype,
                rows=rows,
                n=n,
                k="20..120",
                alpha=alpha,
                distribution=distribution,
            )
            for name, ms, floor, error in (
                ("forward", forward, copy, error_p),
                ("backward", backward, 1.5 * copy, error_x),
            ):
                row = {
                    "op": "soft_topk",
                    "pass": name,
                    **shared,
                    "ms": round(ms, 4),
                    "floor_ms": round(floor, 4),
                }
                row |= {"fraction": round(floor / ms, 4), "max_error": error, "peers": {}}
                if name == "forward":
                    row["peers"] = {peer: round(t, 4) for peer, t in peers.items()}
                found.append(row)
                print(
                    f"{backend:10} {dtype:9} {rows:6}x{n:<7} alpha={alpha:<7g} {name:8} {ms:9.3f} ms"
                    f"  floor {floor:7.3f}  {floor / ms:6.1%}  error {error:.1e}  {row['peers']}",
                    flush=True,
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", help="default: all that run on the device")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--alphas", nargs="+", type=float, default=[1.0, 1e-2, 1e-4])
    parser.add_argument("--distribution", default="relu", choices=FAMILIES)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/soft_topk-DEVICE.json")
    args = parser.parse_args()
    reasons = softtopk.available_backends()
    wanted = args.backends or (["cpu", "reference"] if args.device == "cpu" else ["cuda", "triton"])
    backends = [b for b in wanted if reasons[b] is None]
    rows = []
    for shape in CPU_SHAPES if args.device == "cpu" else GPU_SHAPES:
        for dtype in args.dtypes:
            rows += measure(*shape, dtype, args.alphas, args.distribution, backends, args.device)
            if args.device != "cpu":
                torch.cuda.empty_cache()
    write(args.out or RESULTS / f"soft_topk-{device_label(args.device)}.json", rows)


if __name__ == "__main__":
    main()
