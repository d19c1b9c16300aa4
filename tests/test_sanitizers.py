"""benchmarks/sanitizers.py: what is written down of runs that ended, were stopped, or go on."""

import pytest

from benchmarks.environment import ROOT
from benchmarks.sanitizers import FILES, LEFT_OUT, TOOLS, collect, continued, together


@pytest.mark.parametrize("name", sorted({name for _, left_out, _ in TOOLS.values() for name in left_out}))
def test_what_a_tool_leaves_out_is_there(name):
    """Or a test that was renamed would be run."""
    files = [ROOT / "tests/softtopk" / f"test_{name}.py" for names in FILES.values() for name in names]
    assert any(name in line for file in files for line in file.read_text().splitlines() if "def test" in line)


def test_listed_are_the_tests_of_a_backend(monkeypatch):
    monkeypatch.setitem(FILES, "sparse", ("gate",))
    listed = collect("memcheck", ["cuda"], ["sparse"])
    assert listed and all("[cuda" in test for test in listed)
    assert not any(name in test.split("::")[1] for test in listed for name in LEFT_OUT)


def test_a_file_that_cannot_be_read_is_no_empty_one(monkeypatch):
    monkeypatch.setitem(FILES, "sparse", ("gate", "nothing_of_this_name"))
    with pytest.raises(RuntimeError, match="nothing_of_this_name"):
        collect("memcheck", ["cuda"], ["sparse"])


def part(code, errors=0, unfinished=(), **tests):
    return {"exit_code": code, "tests": tests, "errors": errors, "unfinished": list(unfinished)}


def test_parts_are_added_up():
    row = together("racecheck", [part(0, passed=3), part(9, errors=2, passed=1, failed=1)])
    assert row["exit_codes"] == [0, 9]
    assert row["tests"] == {"passed": 4, "failed": 1}
    assert (row["errors"], row["unfinished"]) == (2, [])


def test_a_stopped_part_leaves_its_tests_and_no_exit_code():
    row = together("racecheck", [part(0, passed=3), part(None, unfinished=["a.py::x", "a.py::y"], passed=1)])
    assert row["exit_codes"] == [0]
    assert row["unfinished"] == ["a.py::x", "a.py::y"]


def test_going_on_keeps_what_was_found_before():
    before = together("racecheck", [part(9, errors=1, unfinished=["a.py::x"], passed=2)])
    row = continued(before, together("racecheck", [part(0, passed=1)]))
    assert row["exit_codes"] == [0, 9]
    assert row["tests"] == {"passed": 3}
    assert (row["errors"], row["unfinished"]) == (1, [])
