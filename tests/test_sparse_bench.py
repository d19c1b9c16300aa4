"""The benchmarks of the sparse path: their bars are all there and tell met from unmet, their data are what
they say, their cells are checked and measured, their peers say why they are absent, their tables and pictures
show the files. Nothing here is timed against anything."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import softtopk
from benchmarks import codes, report, sparse, sparse_bars, sparse_measure, sparse_peers, sparse_plots
from benchmarks import sparse_tables as tables
from benchmarks.environment import write
from benchmarks.sparse_bars import SELECTION_SHAPES, SPARSIFY, Cell, Verdict
from softtopk.backends import reference_sparse


def barred() -> list[Cell]:
    return [cell for cell in sparse_bars.cells() if cell.conditions]


def row_of(cell: Cell, **fields) -> dict:
    """A row that meets every bar of a cell."""
    row = {**cell.keys(), "ms": 1.0, "floor_ms": 1.0, "fraction": 1.0, "bytes": 1, "max_error": 0.0}
    row |= {"peers": {SPARSIFY: 100.0}, "bit_equal": True, "commit": "abc"}
    if cell.run == "backward" and cell.section == "selection":
        row["ms"] = 0.5
    return row | fields


def verdicts(changed: Cell, **fields) -> list[Verdict]:
    """Those of one cell, whose row has these fields; all others meet their bars."""
    rows = [row_of(cell, **(fields if cell == changed else {})) for cell in sparse_bars.cells()]
    return [v for v in sparse_bars.verdicts(rows) if v.of == sparse_bars.label(changed)]


def cell_of(section: str, **fields) -> Cell:
    found = [c for c in barred() if c.section == section]
    return next(c for c in found if all(getattr(c, name) == value for name, value in fields.items()))


def test_the_bars_are_those_of_the_design():
    selection = [c for c in barred() if c.section == "selection"]
    assert {(c.rows, c.n) for c in selection} == set(SELECTION_SHAPES)
    asked = {c.n: c.conditions[0].asked for c in selection if c.run == "forward"}
    assert asked.pop(16384) == "≥ 70% of the floor" and set(asked.values()) == {"≥ 80% of the floor"}
    assert {c.conditions[0].asked for c in selection if c.run == "backward"} == {"≤ 0.5 × the forward"}
    faster = {(c.section, c.latents): c.conditions[0].asked for c in barred() if c.section != "selection"}
    assert faster == {
        ("decode", "uniform"): "≥ 1.1× as fast as sparsify",
        ("decode", "zipf"): "≥ 1.1× as fast as sparsify",
        ("backward", "uniform"): "≥ 1.3× as fast as sparsify",
        ("backward", "zipf"): "≥ 10× as fast as sparsify",
    }
    cells = sparse_bars.cells()
    assert len({sparse_bars.key(c.keys()) for c in cells}) == len(cells)
    assert len({sparse_bars.label(c) for c in barred()}) == len(barred())
    assert max(c.n for c in cells if c.section == "selection_n") == 262144
    assert not any(c.conditions for c in sparse_bars.cells("triton"))


def test_rows_that_reach_every_bar_are_met_and_missing_ones_are_not():
    met = sparse_bars.verdicts([row_of(cell) for cell in sparse_bars.cells()])
    assert all(v.met for v in met) and len(met) == sum(len(c.conditions) for c in barred())
    without = sparse_bars.verdicts([])
    assert len(without) == len(met)
    assert {(v.found, v.met) for v in without} == {("not measured", False)}


def test_each_condition_is_held():
    forward = cell_of("selection", run="forward", n=24576)
    assert [v.met for v in verdicts(forward, fraction=0.80)] == [True]
    assert [v.found for v in verdicts(forward, fraction=0.799)] == ["79.9%"]
    assert not any(v.met for v in verdicts(forward, fraction=0.799))
    assert "error" in verdicts(forward, max_error=2.1e-6)[0].found
    assert verdicts(forward, max_error=float("nan"))[0].met is False
    assert verdicts(forward, error="OutOfMemoryError: x")[0].found == "OutOfMemoryError: x"
    backward = cell_of("selection", run="backward", n=24576)
    assert [v.met for v in verdicts(backward, ms=0.51)] == [False]
    rows = [row_of(c) for c in sparse_bars.cells() if c != forward]
    beside = next(v for v in sparse_bars.verdicts(rows) if v.of == sparse_bars.label(backward))
    assert (beside.found, beside.met) == ("the forward is not measured", False)
    zipf = cell_of("backward", latents="zipf", n=24576)
    assert [v.met for v in verdicts(zipf, ms=10.0)] == [True, True]
    assert [v.met for v in verdicts(zipf, ms=10.1)] == [False, True]
    assert [v.met for v in verdicts(zipf, bit_equal=False)] == [True, False]
    assert [v.found for v in verdicts(zipf, peers={})] == ["sparsify is not measured", "True"]


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_latents_are_different_and_drawn_as_said(kind):
    rows, k, n = 500, 8, 300
    at = codes.draw_latents(rows, k, n, kind, "cpu")
    assert (at.peer_indices.diff(dim=1) > 0).all() and at.peer_indices.min() >= 0
    assert torch.equal(at.indices[:, :k].long(), at.peer_indices)
    assert (at.indices[:, k:] == n).all() and (at.values[:, k:] == 0).all() and (at.counts == k).all()
    assert at.values.shape == at.indices.shape == (rows, sparse_bars.room(k))
    share = torch.bincount(at.peer_indices.flatten(), minlength=n).sort(descending=True).values / rows
    # k draws out of n: every latent in k / n of the rows; by Zipf's law the first one in most.
    assert (share[0] > 0.8) == (kind == "zipf") and (share[0] < 3 * k / n) == (kind == "uniform")


def test_budgets():
    k = codes.draw_budgets("32..96", 4000, "cpu")
    assert k.min() >= 32 and k.max() <= 96 and abs(k.mean() - 64) < 1
    assert codes.draw_budgets("64", 10, "cpu") == 64
    for k in (0.5, 25.6, 25.7, 64, 96):
        assert sparse_bars.room(k) == softtopk.sparse_checks.room(float(k), None, 10_000, True)


def small(section: str, **fields) -> list[Cell]:
    cells = [sparse.small(c) for c in sparse_bars.cells("cpu", [section])]
    cells = [c for c in cells if all(getattr(c, name) == value for name, value in fields.items())]
    return list({sparse_bars.key(c.keys()): c for c in cells}.values())


@pytest.mark.parametrize("dtype", sparse_bars.DTYPES)
def test_every_section_is_checked_and_measured(dtype, capsys):
    peers, _ = sparse_peers.load("cpu")
    for section in sparse_bars.SECTIONS:
        cells = small(section, dtype=dtype)
        for cell in cells[:3] if section == "selection_n" else cells:
            (row,) = sparse.rows_of([cell], peers, "cpu", 1e-7)
            assert sparse_bars.key(row) == sparse_bars.key(cell.keys())
            assert sparse_bars.wrong(cell, row) is None
            assert row["ms"] > 0 and row["bytes"] > 0 and row["floor_ms"] >= 0
            wanted = {"selection": 2 * (cell.run == "forward"), "selection_n": 0}.get(section, 1)
            assert len(row["peers"]) == wanted
            assert row.get("bit_equal", True) is True
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fastest", ["a copy in a graph", "a copy outside", "a kernel"])
def test_the_floor_is_that_of_the_fastest_copy(fastest, monkeypatch):
    seen = {}

    def device_ms(calls, device, recorded=True):
        x, target = calls[0].args[0], calls[0]()
        kernel = calls[0].func is torch.neg
        assert torch.equal(target, -x if kernel else x) and len(calls) == 2
        way = "a kernel" if kernel else "a copy in a graph" if recorded else "a copy outside"
        seen[way] = 1.0 if way == fastest else 2.0
        return seen[way]

    monkeypatch.setattr(sparse_measure, "device_ms", device_ms)
    assert sparse_measure.copy_ms([torch.randn(8), torch.randn(8)], "cuda") == 1.0
    assert len(seen) == 3
    monkeypatch.setattr(sparse_measure, "copy_ms", lambda source, device: 1e3 * len(source))
    assert sparse_measure.bandwidth("cpu") == 2 * (1 << 26)


class Spoilt:
    """The reference with one wrong result."""

    def __init__(self, name: str, change):
        self.name, self.change = name, change

    def __getattr__(self, name: str):
        function = getattr(reference_sparse, name)
        if name != self.name:
            return function

        def changed(*arguments, **options):
            return self.change(function(*arguments, **options))

        return changed


def first_changed(result: tuple, factor: float) -> tuple:
    return (result[0] * factor, *result[1:])


@pytest.mark.parametrize(
    "section, run, name, change",
    [
        ("selection", "forward", "code_forward", lambda r: first_changed(r, 1.001)),
        ("selection", "backward", "code_backward", lambda r: first_changed(r, 1.001)),
        ("decode", "forward", "decode", lambda r: r * 1.1),
        ("backward", "backward", "latent_gradients", lambda r: first_changed(r, 1.1)),
        ("backward", "backward", "latent_gradients", lambda r: (r[0], r[1] * 1.1, *r[2:])),
    ],
)
def test_a_wrong_result_is_seen(section, run, name, change, monkeypatch):
    (cell, *_) = small(section, run=run, dtype="float32", op=small(section, run=run)[0].op)
    monkeypatch.setattr(sparse_measure.dispatch, "sparse_part", lambda backend: Spoilt(name, change))
    (row,) = sparse.rows_of([cell], [], "cpu", 1e-7)
    assert "error" in sparse_bars.wrong(cell, row)


def test_a_wrong_hard_selection_and_a_wrong_peer_are_seen(monkeypatch, capsys):
    cell = next(c for c in small("selection") if c.op == "hard_topk_code")
    spoilt = Spoilt("code_forward", lambda r: first_changed(r, 1.5))
    monkeypatch.setattr(sparse_measure.dispatch, "sparse_part", lambda backend: spoilt)
    (row,) = sparse_measure.selection([cell], "cpu", False)
    assert row["max_error"] > 0 and "error" in sparse_bars.wrong(cell, row)
    monkeypatch.undo()
    good = sparse_peers.embedding_bag()
    bad = replace(good, name="bad", decode=lambda *a: 2 * good.decode(*a))
    cell = small("decode", dtype="float32")[0]
    (row,) = sparse.rows_of([cell], [good, bad], "cpu", 1e-7)
    assert list(row["peers"]) == [good.name] and "bad: its result is off" in capsys.readouterr().out


def test_a_row_that_is_cut_is_an_error():
    cell = small("selection")[0]
    pre = torch.ones(2, 500)
    code = reference_sparse.code_forward(pre, 64.0, 1e-4, None, 0.0, "soft", 32)
    with pytest.raises(RuntimeError, match="more than 32 places"):
        sparse_measure.selection_error(code, pre, torch.full((2,), 64.0), "soft")
    row = sparse_measure.failed(cell, RuntimeError("a"))
    assert sparse_bars.wrong(cell, row) == "RuntimeError: a"


def test_absent_peers_say_why(monkeypatch, tmp_path):
    for variable in (sparse_peers.SPARSIFY_FOLDER, sparse_peers.OPENAI_FOLDER):
        monkeypatch.delenv(variable, raising=False)
    peers, found = sparse_peers.load("cuda")
    assert [peer.name for peer in peers] == [sparse_bars.EMBEDDING_BAG]
    assert "SOFTTOPK_PEER_SPARSIFY is not set" in found[SPARSIFY]
    monkeypatch.setenv(sparse_peers.OPENAI_FOLDER, str(tmp_path))
    with pytest.raises(ImportError, match="has no kernels.py"):
        sparse_peers.openai()


def test_the_command_measures_a_part_and_keeps_the_rest(tmp_path, capsys, monkeypatch):
    path = tmp_path / "sparse-cpu.json"
    command = ["sparse", "--device", "cpu", "--quick", "--dtypes", "float32", "--out", str(path)]
    monkeypatch.setattr("sys.argv", [*command, "--sections", "decode"])
    sparse.main()
    before = json.loads(path.read_text())["rows"]
    assert {row["section"] for row in before} == {"decode"} and all("commit" in row for row in before)
    monkeypatch.setattr("sys.argv", [*command, "--sections", "selection"])
    sparse.main()
    data = json.loads(path.read_text())
    assert [row for row in data["rows"] if row["section"] == "decode"] == before
    assert {row["op"] for row in data["rows"]} == {"soft_topk_code", "hard_topk_code", "sparse_decode"}
    assert data["bars"] == [] and "could not be measured" not in capsys.readouterr().out


def test_adam_is_measured_whatever_the_dtypes(tmp_path, capsys, monkeypatch):
    path = tmp_path / "sparse-cpu.json"
    command = ["sparse", "--device", "cpu", "--quick", "--sections", "adam", "estimator", "--out", str(path)]
    monkeypatch.setattr("sys.argv", [*command, "--dtypes", "bfloat16"])
    sparse.main()
    found = {(row["op"], row["dtype"]) for row in json.loads(path.read_text())["rows"]}
    adam = {("Adam", "float32"), ("Adam, rows of a code", "float32")}
    assert found == {*adam, ("relu_projection", "bfloat16")}
    assert "could not be measured" not in capsys.readouterr().out


def test_both_backends_have_rows_lines_and_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    kinds = {backend: {c.section for c in sparse_bars.cells(backend)} for backend in ("cuda", "triton")}
    assert kinds["cuda"] - kinds["triton"] == {"adam"}
    peers = {"cuda": {sparse_bars.DENSE_TOPK: 5.0}, "triton": {sparse_bars.DENSE_TOPK: 7.0}}
    cells = [cell for backend in peers for cell in sparse_bars.cells(backend)]
    rows = [row_of(c, peers=peers[c.backend], ms=1.0 if c.backend == "cuda" else 3.0) for c in cells]
    sparse.update(tmp_path / "sparse-x.json", "cuda", rows, set(), {})
    page = tables.sparse()
    for backend, peer in (("cuda", "5"), ("triton", "7")):
        assert f"| soft_topk_code | forward | {backend} | bfloat16 |" in page
        assert f"| {sparse_bars.DENSE_TOPK} | forward | {backend} | float32 | {peer} |" in page
        assert f"| sparse_decode {backend} | bfloat16 |" in page
    panel = sparse_plots.of_lengths(sparse_plots.points(rows)).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in panel.lines}
    floors = {f"{dtype}, floor" for dtype in sparse_bars.DTYPES}
    times = {f"{backend}, {dtype}" for backend in peers for dtype in sparse_bars.DTYPES}
    assert set(drawn) == floors | times
    assert all(len(line) == len(sparse_bars.LENGTHS) for line in drawn.values())
    assert set(drawn["triton, float32"]) == {3.0} and set(drawn["cuda, float32"]) == {1.0}


def test_a_file_says_of_every_row_whether_it_is_met(tmp_path, monkeypatch):
    path = tmp_path / "sparse-x.json"
    slow, missing = cell_of("decode", n=65536, latents="zipf"), cell_of("selection", n=131072, run="forward")
    rows = [row_of(c) for c in sparse_bars.cells() if c not in (slow, missing)]
    rows.append(row_of(slow, ms=95.0))
    sparse.update(path, "cuda", rows, set(), {SPARSIFY: "commit 1"})
    data = json.loads(path.read_text())
    unmet = [bar for bar in data["bars"] if not bar["met"]]
    assert {bar["of"] for bar in unmet} == {
        sparse_bars.label(cell) for cell in (slow, missing, replace(missing, run="backward"))
    }
    missed = [row for row in data["rows"] if row.get("met") is False]
    assert {sparse_bars.key(row) for row in missed} == {
        sparse_bars.key(cell.keys()) for cell in (slow, replace(missing, run="backward"))
    }
    whole = {("decode", "cuda")}
    sparse.update(path, "cuda", [row_of(slow)], whole, {})
    again = json.loads(path.read_text())
    assert [sparse_bars.key(r) for r in again["rows"] if r["section"] == "decode"] == [
        sparse_bars.key(slow.keys())
    ]
    assert again["peers"] == {SPARSIFY: "commit 1"}


def test_tables_and_pictures_show_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(sparse_plots, "RESULTS", tmp_path)
    assert tables.sparse() == tables.step() == tables.curves() == tables.step_summary() == tables.NOTHING
    assert sparse_plots.stale() == []
    slow = cell_of("decode", n=65536, latents="zipf")
    path = tmp_path / "sparse-x.json"
    rows = [row_of(c, **({"ms": 95.0} if c == slow else {})) for c in sparse_bars.cells()]
    sparse.update(path, "cuda", rows, set(), {SPARSIFY: "commit 1"})
    page = tables.sparse()
    assert (
        page.count("✗") == 2 and "95 ✗ | 100% | 100 (1.05×) |" in page and "Peers: sparsify commit 1." in page
    )
    picture = tmp_path / "sparse-x-n.png"
    assert sparse_plots.stale() == [picture] and f"results/{picture.name}" in page
    sparse_plots.draw()
    assert sparse_plots.stale() == []
    row = next(row for row in rows if row["section"] == "selection_n")
    row["ms"] = 3.0
    write(path, rows, peers={}, bars=[])
    assert sparse_plots.stale() == [picture]
    monkeypatch.setattr(report, "DOCUMENTS", ())
    monkeypatch.setattr(report.speed_tables, "files", lambda: [])
    assert report.stale() == [picture]
