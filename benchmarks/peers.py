"""Our operator beside other implementations: the errors of each, and what each can do.

    python -m benchmarks.peers                     # on the GPU if there is one
    python -m benchmarks.peers --device cpu --list # what is found here, and why the rest is not

Peers are found where they are:

    entmax, softtorch          by import
    SOFTTOPK_PEER_LAPSUM       a checkout of https://github.com/gmum/LapSum: its native extension,
                               which torch compiles on first use, and the PyTorch of its notebooks
    SOFTTOPK_PEER_DFTOPK       a checkout of https://github.com/zhangzhen97/DFTOPK

A checkout without .git is given its commit by SOFTTOPK_PEER_LAPSUM_COMMIT, SOFTTOPK_PEER_DFTOPK_COMMIT.

A row of the result file is one (implementation, family, n, alpha) over the budgets of tests/cases.py,
every budget in a call of its own with one float32 row, so that all can take part: the number of rows
that were computed, that held a NaN or an infinity (in p or a gradient), and that could not be computed,
by reason; and the worst errors of the finite ones. sum is |sum(p) - k|, sum_relative the same over
max(1, k). The errors of p and the gradients are against the float64 oracle of tests/accuracy.py: grad_x
over its largest value in the row (1e-6 max|v|/alpha where that is less), grad_k over max|v|, grad_alpha
over the sum of its terms. They have a meaning only where the operator is LapSum; for another relaxation
they are null.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import RESULTS, device_label, write
from benchmarks.features import in_a_process, one_line
from benchmarks.implementations import Implementation, load, names
from tests.accuracy import Oracle, alpha_weight, oracle
from tests.cases import ALPHAS, BAR_FAMILIES, budgets, make

LENGTHS = (1, 2, 31, 512, 4096, 16384)
ERRORS = ("p", "sum", "sum_relative", "grad_x", "grad_k", "grad_alpha")


def compute(
    implementation: Implementation, x: Tensor, k: float, alpha: float, v: Tensor
) -> dict[str, Tensor | None]:
    """p and the gradients of <p, v> of one row, float64 on the CPU, None where there is no gradient."""
    if implementation.whole_k:
        if k != int(k):
            raise ValueError("k must be whole")
        k = int(k)
    if implementation.is_lapsum:
        k = torch.tensor([k], dtype=x.dtype, device=x.device, requires_grad=True)
        alpha = torch.tensor(alpha, dtype=x.dtype, device=x.device, requires_grad=True)
    x = x.clone().requires_grad_()
    p = implementation.function(x, k, alpha, -1)
    leaves = {"grad_x": x, "grad_k": k, "grad_alpha": alpha}
    leaves = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    found = torch.autograd.grad(p, tuple(leaves.values()), v, allow_unused=True)
    got = dict.fromkeys(("grad_x", "grad_k", "grad_alpha")) | dict(zip(leaves, found, strict=True))
    if got["grad_alpha"] is not None:  # LapSum negates alpha in place and derives with respect to that
        got["grad_alpha"] = got["grad_alpha"] * alpha.detach().sign()
    got["p"] = p
    return {name: None if t is None else t.detach().double().cpu() for name, t in got.items()}


def errors(
    got: dict[str, Tensor | None], want: Oracle, row: int, k: float, alpha: float, v: Tensor
) -> dict[str, float | None]:
    """The errors of one row against one row of the oracle, as the module's head defines them."""
    v_max = v.abs().max().item()
    floor = 1e-6 * v_max / alpha
    largest = max(want.grad_x[row].abs().max().item(), floor)
    weight = alpha_weight(want, torch.full((len(want.p),), alpha).double(), v.expand(len(want.p), -1))[row]
    found = {
        "p": (got["p"] - want.p[row]).abs().max(),
        "grad_x": None if got["grad_x"] is None else (got["grad_x"] - want.grad_x[row]).abs().max() / largest,
        "grad_k": None if got["grad_k"] is None else (got["grad_k"] - want.grad_k[row]).abs().max() / v_max,
        "grad_alpha": None,
    }
    if got["grad_alpha"] is not None and weight > floor:
        found["grad_alpha"] = (got["grad_alpha"] - want.grad_alpha[row]).abs().max() / weight
    return {name: None if e is None else e.item() for name, e in found.items()}


def cell(
    implementation: Implementation, x: Tensor, k: list[float], alpha: float, v: Tensor, want: Oracle, device
) -> dict:
    """One row of the result file without its keys: x, v (rows, n), one budget for each row."""
    worst: dict[str, float] = {}
    rows, not_finite = 0, 0
    failed: dict[str, int] = {}
    for i, budget in enumerate(k):
        try:
            got = compute(implementation, x[i : i + 1].to(device), budget, alpha, v[i : i + 1].to(device))
        except Exception as error:
            reason = one_line(error)
            failed[reason] = failed.get(reason, 0) + 1
            continue
        rows += 1
        not_finite += any(t is not None and not t.isfinite().all() for t in got.values())
        off = abs(got["p"].sum().item() - budget)
        found = {"sum": off, "sum_relative": off / max(1, budget)}
        if implementation.is_lapsum:
            found |= errors(got, want, i, budget, alpha, v[i : i + 1].double())
        for name, error in found.items():
            if error is not None and math.isfinite(error):
                worst[name] = max(worst.get(name, 0.0), error)
    figures = {name: float(f"{worst[name]:.3g}") if name in worst else None for name in ERRORS}
    return {"rows": rows, "not_finite": not_finite, "failed": failed, **figures}


def table(implementations: list[Implementation], device: str, lengths: list[int]) -> list[dict]:
    rows = []
    for n in lengths:
        for family in BAR_FAMILIES:
            k = budgets(n)
            x = make(family, len(k), n, seed=n)
            v = torch.randn(x.shape, generator=torch.Generator().manual_seed(n + 1))
            for alpha in (torch.tensor(a).item() for a in ALPHAS):  # as float32 holds it: some round it
                want = oracle(x, torch.tensor(k), alpha, v)
                for implementation in implementations:
                    if implementation.max_n is not None and n > implementation.max_n:
                        continue
                    keys = {"name": implementation.name, "family": family, "n": n}
                    found = cell(implementation, x, k, alpha, v, want, device)
                    rows.append(keys | {"alpha": float(f"{alpha:.3g}")} | found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--max-n", type=int, default=max(LENGTHS), help="the longest row, default %(default)s"
    )
    parser.add_argument("--list", action="store_true", help="say what is found and stop")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/peers-DEVICE.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    implementations = []
    for name in names(args.device):
        try:
            implementations.append(load(name, args.device))
            print(f"{name}: {implementations[-1].version}")
        except Exception as error:  # a peer that is absent, or that does not import or compile here
            print(f"{name}: not here, {one_line(error)}")
    if args.list:
        return
    rows = table(implementations, args.device, [n for n in LENGTHS if n <= args.max_n])
    features = {i.name: in_a_process(i.name, args.device) for i in implementations}
    peers = {
        i.name: {"version": i.version, "source": i.source, "operator": i.operator, "max_n": i.max_n}
        for i in implementations
    }
    path = args.out or RESULTS / f"peers-{device_label(args.device)}.json"
    write(path, rows, peers=peers, features=features)


if __name__ == "__main__":
    main()
