"""The README: its tables are those of the result files, its first example runs."""

from __future__ import annotations

import re

from benchmarks.report import README, render


def test_tables_are_fresh():
    text = README.read_text()
    assert render(text) == text, "run python -m benchmarks.report"


def test_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / target).is_file(), target


def test_the_first_example_runs(capsys):
    (example, *_) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    exec(example, names)
    assert names["k"].grad.shape == (8,)
    assert names["mask"].sum(-1).tolist() == [32.0] * 8
    assert names["counts"].tolist() == [32] * 8
