"""Thousands of random calls per backend; `--fuzz N` runs N rows, and a long run leaves a result file."""

from __future__ import annotations

import types

import pytest

from benchmarks.environment import RESULTS, device_label, write
from softtopk import dispatch
from softtopk.backends import reference
from tests.fuzz import Case

ROWS = {"reference": 4000, "cpu": 10_000, "triton": 10_000, "cuda": 10_000}
INTERPRETED = 40  # rows of the Triton interpreter, at a tenth of a second each
LONG = 100_000


def test_random_calls(backend, device, request):
    slow = backend == "triton" and device == "cpu"
    wanted = request.config.getoption("--fuzz") or (INTERPRETED if slow else ROWS[backend])
    first = request.config.getoption("--fuzz-seed")
    rows, seed = 0, first
    while rows < wanted:
        rows += Case(seed, slow, few_kernels=backend == "triton" and not slow).check(backend, device)
        seed += 1
    if rows >= LONG:
        found = {"backend": backend, "rows": rows, "batches": seed - first, "first_seed": first}
        write(RESULTS / f"fuzz-{backend}-{device_label(device)}.json", [found])


@pytest.mark.parametrize("wrong", ["y", "grad_x", "grad_k", "grad_alpha", "mask"])
def test_errors_are_found(monkeypatch, wrong):
    """A backend that is off by little in one result does not pass."""

    def forward(*arguments):
        y, solution = reference.soft_topk_forward(*arguments)
        return (None if y is None else y * (1 + 3e-5 * (wrong == "y"))), solution

    def backward(*arguments):
        gradients = reference.soft_topk_backward(*arguments)
        names = ("grad_x", "grad_k", "grad_alpha")
        return tuple(g * (1 + 1e-3 * (wrong == n)) for n, g in zip(names, gradients, strict=True))

    def mask(x, *rest):
        right = reference.hard_topk_mask(x, *rest)
        return right.roll(1, 1) if wrong == "mask" else right

    kernels = types.SimpleNamespace(
        reads=reference.reads, soft_topk_forward=forward, soft_topk_backward=backward, hard_topk_mask=mask
    )
    monkeypatch.setattr(dispatch, "kernels", lambda backend, device: kernels)
    with pytest.raises(AssertionError, match="--fuzz-seed"):
        for seed in range(60):
            Case(seed).check("reference", "cpu")
