"""The README and that of the benchmarks: tables and plots are those of the result files, the first example
runs."""

from __future__ import annotations

import re

import pytest

from benchmarks.report import DOCUMENTS, README, stale


def test_tables_and_plots_are_fresh():
    assert stale() == [], "run python -m benchmarks.report"


@pytest.mark.parametrize("document", DOCUMENTS, ids=["README", "benchmarks"])
def test_what_is_linked_exists(document):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_first_example_runs(capsys):
    (example, *_) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    exec(example, names)
    assert names["k"].grad.shape == (8,)
    assert names["mask"].sum(-1).tolist() == [32.0] * 8
    assert names["counts"].tolist() == [32] * 8
