"""The speed table: its bars are all there, its verdicts tell met from unmet, its files merge, its pages
and plots are those of the files. Nothing here is timed against anything."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    bars,
    measure,
    report,
    result_file,
    small,
    soft_topk,
    speed_peers,
    speed_tables,
    tables,
    timing,
)
from benchmarks.bars import ALPHAS, DTYPES, LENGTHS, TOPK, Cell
from benchmarks.environment import write

PASSES = ("forward", "backward")


def of(section: str, **fields) -> list[Cell]:
    cells = [c for c in bars.cells("cuda") if c.section == section]
    return [c for c in cells if all(getattr(c, name) == value for name, value in fields.items())]


def row_of(cell: Cell, **fields) -> dict:
    """A row that meets every bar."""
    row = {**cell.keys(), "ms": 1.0, "floor_ms": 1.0, "fraction": 1.0, "max_error": 0.0, "commit": "abc"}
    row |= {"peers": {name: 100.0 for name, _ in cell.speedups if name != "*"} | {TOPK: 100.0}}
    if cell.most_ms is not None:
        row["ms"] = cell.most_ms
    return row | fields


def verdict(cell: Cell, **fields) -> str | None:
    return bars.unmet(cell, row_of(cell, **fields), {})


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_and_dtype_has_its_cells(n, dtype):
    each = {(run, alpha) for run in PASSES for alpha in ALPHAS}
    at = {"n": n, "dtype": dtype}
    assert {(c.run, c.alpha) for c in of("headline", **at)} == each
    assert {(c.run, c.alpha) for c in of("triton", **at)} == each
    for k in ("n/64", "n/8", "n/2"):
        assert {(c.run, c.alpha) for c in of("large_k", k=k, **at)} == each
    families = {c.distribution for c in of("adversarial", **at)}
    assert families == set(bars.ADVERSARIAL) and len(families) == 8
    assert all({(c.run, c.alpha) for c in of("adversarial", distribution=f, **at)} == each for f in families)
    assert len(of("hard", **at)) == 1
    assert {(c.rows, c.run) for c in of("small", **at)} == {
        (rows, run) for rows in (1, 2, 8, 64) for run in ("forward", "graph")
    }
    large = [c for c in bars.cells("cuda") if c.large and (c.n, c.dtype) == (n, dtype)]
    assert all(c.rows * n * bars.ITEMSIZE[dtype] == 1 << 30 for c in large)


def test_the_other_cells_are_there():
    assert {(c.n, c.dtype, c.run, c.alpha) for c in of("odd")} == {
        (n, dtype, run, alpha)
        for n in (4095, 5000, 24576, 50257)
        for dtype in DTYPES
        for run in PASSES
        for alpha in ALPHAS
    }
    assert max(c.n for c in of("triton")) == 262144
    assert [c.most_ms for c in of("overhead", bar=True)] == [0.010]
    cells = bars.cells("cuda") + bars.cells("cpu") + small.sweep_cells("cuda", ["cuda", "triton"])
    assert len({bars.key(c.keys()) for c in cells}) == len(cells)


def test_the_bars_are_those_of_the_design():
    at = {"dtype": "float32", "run": "forward", "alpha": 1e-4}
    assert [c.fraction for c in of("headline", **at)] == [0.90, 0.90, 0.85, 0.75, 0.75]
    assert {c.fraction for c in of("large_k")} == {0.6} and {c.fraction for c in of("adversarial")} == {0.4}
    hard = {(c.n, c.dtype): c.fraction for c in of("hard")}
    assert hard.pop((4096, "bfloat16")) == 0.5 and set(hard.values()) == {0.7}
    triton = {(c.dtype, c.n > 32768): c.fraction for c in of("triton")}
    assert triton == {
        ("float32", False): 0.6,
        ("bfloat16", False): 0.4,
        ("float32", True): None,
        ("bfloat16", True): None,
    }
    both = [c for c in bars.cells("cpu") if c.run == "forward+backward"]
    assert {c.speedups for c in both} == {(("reference", 5.0), ("LapSum PyTorch", 5.0), ("LapSum C++", 3.0))}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_rows_that_reach_every_bar_are_met(device):
    cells = bars.cells(device)
    rows = [row_of(cell) for cell in cells]
    assert [reason for _, _, reason in bars.verdicts(device, rows) if reason] == []
    without = bars.verdicts(device, [])
    assert len(without) == sum(c.bar for c in cells)
    assert {reason for _, _, reason in without} == {"not measured"}


def test_each_condition_is_held():
    headline = of("headline", n=4096, run="forward", dtype="float32")[0]
    assert verdict(headline, fraction=0.90) is None
    assert "89.9% < 90.0%" in verdict(headline, fraction=0.899)
    assert "error" in verdict(headline, max_error=1.1e-6)
    assert verdict(headline, max_error=float("nan"))
    assert "512 MiB" in verdict(headline, rows=headline.rows // 2)
    assert verdict(headline, error="OutOfMemoryError: x") == "OutOfMemoryError: x"
    half = replace(headline, dtype="bfloat16", rows=2 * headline.rows)
    assert verdict(half, max_error=1.9e-3) is None and verdict(half, max_error=2.1e-3)
    hard = of("hard", n=4096, dtype="float32")[0]
    assert verdict(hard, peers={TOPK: 1.1, "CUB 3.6": 1.2}) is None
    assert "CUB 3.6" in verdict(hard, peers={TOPK: 1.1, "CUB 3.6": 0.9})
    assert verdict(hard, peers={"CUB 3.6": 2.0}) == f"{TOPK} is not measured"
    assert "error" in verdict(hard, max_error=1.0)
    overhead = of("overhead", bar=True)[0]
    assert verdict(overhead, ms=0.0101, max_error=None) and verdict(overhead, ms=0.01, max_error=None) is None
    both = next(c for c in bars.cells("cpu") if c.run == "forward+backward")
    assert verdict(both, peers={"reference": 5.0}) is None
    assert verdict(both, peers={"reference": 4.9}) and verdict(both, peers={"LapSum C++": 9.0})
    assert "LapSum C++" in verdict(both, peers={"reference": 50.0, "LapSum C++": 2.9})


def test_an_odd_length_is_held_against_its_neighbour():
    odd = of("odd", n=24576, run="backward", dtype="bfloat16", alpha=1e-2)[0]
    beside = of("headline", n=32768, run="backward", dtype="bfloat16", alpha=1e-2)[0]
    assert verdict(odd) == "n = 32768 is not measured"
    measured = {bars.key(beside.keys()): row_of(beside, fraction=0.92)}
    assert bars.unmet(odd, row_of(odd, fraction=0.801), measured) is None
    assert bars.unmet(odd, row_of(odd, fraction=0.799), measured) == "79.9% < 80.0%"


def test_sections_are_merged_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(result_file, "commit", lambda: "first")
    path = tmp_path / "soft_topk-gpu.json"
    headline, hard = of("headline")[:2], of("hard")[:2]
    old = [row_of(c, peers={"CUB 3.6": 7.0}) for c in headline] + [row_of(c) for c in hard]
    old.append({**old[0], "alpha": 0.5})  # of a cell that is no longer there
    result_file.update(path, "cuda", old, set(), {"CUB 3.6": "300600", "torch.sort": "2"})

    monkeypatch.setattr(result_file, "commit", lambda: "second")
    new = [row_of(headline[0], ms=2.0, peers={TOPK: 3.0})]
    part = result_file.update(path, "cuda", new, set(), {"CUB 3.6": "absent: why"})
    assert part == json.loads(path.read_text())["rows"] and len(part) == len(old)
    by_key = {bars.key(row): row for row in part}
    again = by_key[bars.key(headline[0].keys())]
    assert (again["ms"], again["commit"]) == (2.0, "second")
    assert again["peers"] == {"CUB 3.6": 7.0, TOPK: 3.0}
    assert by_key[bars.key(headline[1].keys())]["commit"] == "first"
    assert json.loads(path.read_text())["peers"] == {"torch.sort": "2", "CUB 3.6": "absent: why"}

    whole = result_file.update(path, "cuda", new, {"headline"}, {})
    assert {(row["section"], row["commit"]) for row in whole} == {("headline", "second"), ("hard", "first")}
    assert sum(row["section"] == "headline" for row in whole) == 1


def test_notes_go_to_the_rows_below_their_bar(tmp_path):
    slow, fast = of("headline", n=65536)[:2]
    rows = [row_of(slow, fraction=0.1), row_of(fast, note="no longer true")]
    notes = [{"cell": {"n": 65536, "op": "soft_topk"}, "note": "Why."}, {"cell": {"n": 4096}, "note": "Not."}]
    assert [row.get("note") for row in result_file.annotate("cuda", rows, notes)] == ["Why.", None]


def test_measuring_nothing_keeps_the_environment(tmp_path):
    path = tmp_path / "soft_topk-gpu.json"
    write(path, [row_of(of("hard")[0])], environment={"gpu": "NVIDIA X"}, peers={})
    result_file.update(path, "cuda", [], set(), {})
    assert json.loads(path.read_text())["environment"] == {"gpu": "NVIDIA X"}


def on_cpu(cell: Cell, **fields) -> Cell:
    return replace(cell, backend="cpu", rows=3, n=300, large=False, **fields)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_are_measured_on_the_same_data(dtype, capsys):
    cells = [on_cpu(c) for c in of("headline", dtype=dtype, n=4096)]
    cells += [on_cpu(c) for c in of("large_k", dtype=dtype, n=4096, k="n/8", alpha=1.0)]
    cells += [on_cpu(c) for c in of("hard", dtype=dtype, n=4096)]
    peers, _ = speed_peers.load("cpu", [TOPK, "torch.sort", "reference"])
    rows = list(measure.of_one_x(cells, peers, "cpu"))
    by_key = {bars.key(row): row for row in rows}
    assert set(by_key) == {bars.key(c.keys()) for c in cells} and len(rows) == len(cells)
    for cell in cells:
        row = by_key[bars.key(cell.keys())]
        assert bars.unmet(replace(cell, fraction=None, speedups=(), required=()), row, by_key) is None
        assert row["ms"] > 0 and row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"], rel=0.1)
        wanted = {"headline": {"forward": {TOPK, "torch.sort", "reference"}, "backward": {"reference"}}}
        wanted["hard"] = {"forward": {TOPK, "torch.sort"}}
        assert set(row["peers"]) == wanted.get(cell.section, {}).get(cell.run, set())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", bars.ADVERSARIAL)
def test_adversarial_rows_are_checked(family):
    cells = [on_cpu(c) for c in of("adversarial", distribution=family, n=4096, dtype="float32", alpha=1e-2)]
    for row in measure.of_one_x(cells, [], "cpu"):
        assert row["max_error"] <= bars.ERRORS[row["pass"], "float32"]


def test_a_wrong_result_is_seen():
    class Wrong:
        def soft_topk_forward(self, x, k, alpha, largest):
            p, solution = measure.reference.soft_topk_forward(x, k, alpha, largest)
            p[-1, 0] = torch.nan
            return p, solution

        def soft_topk_backward(self, *arguments):
            grad_x, *rest = measure.reference.soft_topk_backward(*arguments)
            return grad_x * 1.001, *rest

    x = torch.randn(4, 50)
    errors, _ = measure.soft_errors(Wrong(), speed_peers.Problem(x, torch.full((4,), 5.0), 0.1, x))
    assert errors["forward"] == measure.WRONG and errors["backward"] > 5e-4


def test_a_cell_that_fails_says_so():
    cell = replace(of("hard")[0], backend="cpu", rows=3, n=30)  # k = 64 of 30
    (row,) = measure.of_one_x([cell], [], "cpu")
    assert row["ms"] is None and "ValueError" in row["error"]
    assert bars.unmet(cell, row, {}) == row["error"]


def test_calls_take_turns():
    made = []
    calls = [lambda name=name: made.append(name) for name in "abc"]
    assert 0 < timing.median_ms(calls, "cpu", budget_s=0, least=3) < 100
    assert made == [*"abcab"]  # two to warm up, three that count


def test_small_problems_and_sweeps(monkeypatch):
    calls = []
    for name in ("graph_ms", "row_of_calls_ms"):
        monkeypatch.setattr(small, name, lambda made: (calls.append(len(made)), made[0](), 0.5)[-1])
    for run in ("forward", "graph"):
        row = small.small(on_cpu(of("small", run=run, rows=2)[0]), "cpu")
        assert row["ms"] == 0.5 and row["peers"] == {TOPK: 0.5} and row["max_error"] <= 1e-6
    assert set(calls) == {small.CALLS}
    monkeypatch.setattr(small, "host_ms", lambda call: (call(), 0.01)[-1])
    for cell in of("overhead"):
        row = small.overhead(replace(cell, backend="cpu"), "cpu")
        assert row["ms"] == 0.01 and bars.unmet(cell, row, {}) is None
    cells = small.sweep_cells("cpu", ["cpu"])
    assert {c.n for c in cells if c.section == "sweep_n"} == {4**i for i in range(3, 11)}
    for cell in cells:
        if (cell.section, cell.n, cell.rows) in (("sweep_n", 4096, 256), ("sweep_rows", 16384, 4)):
            row = small.sweep(cell, "cpu")
            assert "error" not in row and row["max_error"] <= 1e-5 and row["ms"] > 0


def test_the_command_measures_a_part(tmp_path, capsys, monkeypatch):
    path = tmp_path / "soft_topk-cpu.json"
    monkeypatch.setattr(bars, "CPU_SHAPES", ((4, 512),))
    command = ["soft_topk", "--device", "cpu", "--sections", "cpu", "--dtypes", "float32", "--alphas", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--peers", TOPK, "reference", "--out", str(path)])
    soft_topk.main()
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert {(row["op"], row["pass"]) for row in rows} == {
        ("soft_topk", "forward"),
        ("soft_topk", "backward"),
        ("soft_topk", "forward+backward"),
        ("hard_topk", "forward"),
    }
    assert printed.count(" met") + printed.count("UNMET") - 1 == 3  # a line says how many were met
    assert all("commit" in row for row in rows)


def synthetic(path, missing: Cell, below: Cell) -> list[dict]:
    """A result file in which one cell is missing and one is below its bar, with its note."""
    rows = [row_of(c) for c in bars.cells("cuda") if c not in (missing, below)]
    rows.append(row_of(below, fraction=0.123, ms=8.13, note="Three designs were tried."))
    for n, ms in ((64, 1.0), (4096, 0.3)):
        for cell in small.sweep_cells("cuda", ["cuda"]):
            if cell.section == "sweep_n" and cell.n == n:
                rows.append(row_of(cell, ms=ms, floor_ms=0.1))
    write(path, rows, environment={"gpu": "NVIDIA X", "torch": "2", "commit": "abc"}, peers={"CUB 3.6": "1"})
    return rows


def test_tables_show_what_is_met_missed_and_missing(tmp_path, monkeypatch):
    for module in (speed_tables, tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    missing, below = of("headline", n=16384)[0], of("headline", n=65536)[0]
    synthetic(tmp_path / "soft_topk-x.json", missing, below)
    page = speed_tables.everything()
    assert "| headline | 60 | 58 | 1 | 1 | abc |" in page
    assert page.count("✗") == 1 and "8.13 (12%) ✗" in page
    assert page.count("| – |") == 1
    assert "Three designs were tried." in page and "CUB 3.6 1" in page
    assert "![The cost against n" in page and "(results/soft_topk-x-n.png)" in page
    compact = speed_tables.fractions("soft_topk-x.json")
    assert "| alpha = 1 | 100% | – | 100% | 12% ✗ | 100% |" in compact
    assert "929 of the 931 bars are met, 1 cells not measured yet" in compact


def test_a_stale_page_or_plot_is_seen(tmp_path, monkeypatch):
    for module in (speed_tables, tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table speed -->\nstale\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "DOCUMENTS", (page,))
    path = tmp_path / "soft_topk-x.json"
    missing, below = of("headline", n=16384)[0], of("headline", n=65536)[0]
    rows = synthetic(path, missing, below)
    picture = tmp_path / "soft_topk-x-n.png"
    assert report.stale() == [page, picture]
    monkeypatch.setattr("sys.argv", ["report"])
    report.main()
    assert report.stale() == []
    assert page.read_text().startswith("before\n") and "stale" not in page.read_text()
    drawn = picture.read_bytes()
    report.main()
    assert picture.read_bytes() == drawn

    sweep = next(row for row in rows if row["section"] == "sweep_n")
    sweep["ms"] = 2.5
    write(path, rows, environment=json.loads(path.read_text())["environment"], peers={"CUB 3.6": "1"})
    assert report.stale() == [picture]
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="soft_topk-x-n.png"):
        report.main()


def test_absent_peers_say_why(monkeypatch, tmp_path):
    for variable in ("SOFTTOPK_PEER_LAPSUM", "SOFTTOPK_PEER_CUB"):
        monkeypatch.delenv(variable, raising=False)
    peers, found = speed_peers.load("cuda", ["CUB", "LapSum native", "torch.sort"])
    assert [peer.name for peer in peers] == ["torch.sort"]
    assert found["CUB"] == "absent: ImportError: SOFTTOPK_PEER_CUB is not set"
    assert "SOFTTOPK_PEER_LAPSUM is not set" in found["LapSum native"]
    with pytest.raises(ImportError, match="neither float32-4096-sm90.so nor cub"):
        speed_peers.cub_library(tmp_path, torch.float32, 4096, "90")


def test_a_peer_that_selects_other_values_is_seen():
    x = torch.randn(3, 500)
    problem = speed_peers.Problem(x, torch.full((3,), 64.0), 0.1, x)

    def selecting(values) -> speed_peers.Peer:
        return speed_peers.Peer("peer", "1", lambda p: {}, values)

    assert speed_peers.wrong(selecting(lambda p: p.x.topk(64).values.flip(1)), problem) is None
    assert "other values" in speed_peers.wrong(selecting(lambda p: p.x[:, :64]), problem)
