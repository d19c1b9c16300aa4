"""The README and that of the benchmarks: tables and plots are those of the result files, the first example
runs."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.report import DOCUMENTS, README, stale


def test_tables_and_plots_are_fresh():
    assert stale() == [], "run python -m benchmarks.report"


@pytest.mark.parametrize("document", DOCUMENTS, ids=["README", "benchmarks"])
def test_what_is_linked_exists(document):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def run_example(first_line: str) -> dict:
    """What the example of the README that has this line defines."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    exec(next(example for example in examples if first_line in example), names)
    return names


def test_the_first_example_runs(capsys):
    names = run_example("import SoftTopK, hard_topk")
    assert names["k"].grad.shape == (8,)
    assert names["mask"].sum(-1).tolist() == [32.0] * 8
    assert names["counts"].tolist() == [32] * 8


def test_the_example_of_codes_runs(capsys):
    names = run_example("import encode_soft_topk")
    code = names["code"]
    assert code.counts.min() >= 32 and not code.overflow
    assert torch.allclose(code.values.sum(), code.to_dense().sum())
    assert all(names[name].grad.count_nonzero() > 0 for name in ("W_enc", "W_dec", "b_enc", "k"))
