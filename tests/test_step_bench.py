"""The benchmarks of whole training steps: the bars tell met from unmet, the floor is the design's, the stages
of a step are found, trainers are timed and kept. Nothing here is timed against anything."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import curves, sparse_bars, sparse_plots, step, step_ours, step_peers, step_stages
from benchmarks import sparse_tables as tables
from benchmarks.sparse_bars import (
    BOTTLENECK,
    SOFTSAE_REFERENCE,
    STEP_SHAPES,
    TOPK,
    TOPK_REFERENCE,
    WIDE,
)
from benchmarks.step_stages import Kernel, Mark, Marker

SMALL = (32, 16, 256, 8)


def rows_that_meet() -> list[dict]:
    """Of every trainer at every shape; all bars are just met."""
    found = []
    for shape in STEP_SHAPES:
        slowest = 50.0 if shape == STEP_SHAPES[1] else 100.0
        ms = {(SOFTSAE_REFERENCE, "TF32"): slowest, (TOPK_REFERENCE, "TF32"): 2.5}
        ms |= {(WIDE, "bfloat16"): 1.0, (BOTTLENECK, "bfloat16"): 1.0, (TOPK, "bfloat16"): 0.92}
        for (trainer, precision), taken in ms.items():
            beyond = 5 << 20 if trainer == SOFTSAE_REFERENCE else 1 << 20
            implementation = step.OURS if precision == "bfloat16" else trainer
            row = step.row_of(shape, trainer, implementation, "sparse", precision, ms=taken)
            found.append(row | {"beyond_bytes": beyond, "peak_bytes": 9 << 20})
    return found


def changed(trainer: str, shape: tuple, **fields) -> list[sparse_bars.Verdict]:
    """The verdicts that are missed when the row of a trainer at a shape has these fields."""
    rows = rows_that_meet()
    for row in rows:
        if row["trainer"] == trainer and (row["rows"], row["d"], row["n"], row["k"]) == shape:
            row |= fields
    return [v for v in sparse_bars.step_verdicts(rows) if not v.met]


def test_the_bars_of_a_step():
    assert changed(WIDE, STEP_SHAPES[0]) == []
    assert len(sparse_bars.step_verdicts([])) == 4 * 4 + 1
    assert not any(v.met for v in sparse_bars.step_verdicts([]))
    first, second = STEP_SHAPES[:2]
    assert [v.asked[:9] for v in changed(WIDE, first, ms=1.26)] == ["≥ 2× as f"]
    assert [v.asked[:10] for v in changed(SOFTSAE_REFERENCE, first, ms=49.0)] == ["≥ 50× as f"]
    missed = changed(SOFTSAE_REFERENCE, second, ms=45.0)  # the wide one is to be 40 times as fast there
    assert [v.of.split(";")[0] for v in missed] == [BOTTLENECK]
    assert [v.found for v in changed(WIDE, first, beyond_bytes=2 << 20)] == ["0.40"]
    assert [v.found for v in changed(BOTTLENECK, first, ms=1.1)] == ["1.20"]
    assert {v.found for v in changed(TOPK, first, ms=None)} == {"TopK is not measured"}
    assert {v.found for v in changed(WIDE, first, ms=None)} == {f"{WIDE} is not measured"}


def test_the_faster_path_counts():
    shape = STEP_SHAPES[0]
    rows = [
        step.row_of(shape, WIDE, step.OURS, path, precision, ms=ms)
        for path, precision, ms in (
            *(("sparse", "bfloat16", 2.0), ("dense", "bfloat16", 1.0)),
            *(("auto", "bfloat16", None), ("sparse", "float32", 0.5)),
        )
    ]
    assert sparse_bars.fastest(rows, shape, WIDE, "bfloat16")["path"] == "dense"
    assert sparse_bars.fastest(rows, STEP_SHAPES[1], WIDE) is None


def test_the_floor_is_the_design_s():
    found = [
        sum(sparse_bars.step_floor_ms(*shape, shape[2], bytes_per_s=4.25e12).values())
        for shape in STEP_SHAPES
    ]
    assert found == pytest.approx([0.52, 2.2, 1.7, 7.5], rel=0.08)
    rows, d, n, k = STEP_SHAPES[2]
    without = sparse_bars.step_floor_ms(rows, d, n, k, 0, 4.25e12)
    wide = sparse_bars.step_floor_ms(rows, d, n, k, n, 4.25e12)
    assert wide["products"] == pytest.approx(3 * without["products"])
    assert wide["Adam"] == pytest.approx(1.5 * without["Adam"])


MARKER = f"at::cuda::{step_stages.MARKER}(long)"


def timeline(*names: str) -> list[Kernel]:
    """Kernels one after the other, 2 us each, given in another order."""
    return [Kernel(name, 10.0 * i, 2.0) for i, name in enumerate(names)][::-1]


def test_kernels_belong_to_what_encloses_them():
    marks = [Mark("then", "other"), Mark("enter", "dW_enc"), Mark("enter", "gate"), Mark("leave", "gate")]
    marks += [Mark("leave", "dW_enc"), Mark("then", "loss")]
    m = MARKER
    one = ("copy", m, m, "a", m, "b", "b", m, "a", m, "c", m, "d")
    found = step_stages.by_stage(timeline(*one), marks, 1)
    assert found == {
        "other": {"copy": [2.0], "c": [2.0]},
        "dW_enc": {"a": [2.0, 2.0]},
        "gate": {"b": [2.0, 2.0]},
        "loss": {"d": [2.0]},
    }
    # What is before the first marker of the second step is what the last mark said.
    twice = step_stages.by_stage(timeline(*one, *one), marks, 2)
    totals, kernels = step_stages.summary(twice, 2)
    assert totals == {"loss": 0.003, "gate": 0.004, "dW_enc": 0.004, "other": 0.003}
    assert list(totals) == [stage for stage in step_stages.STAGES if stage in totals]
    assert kernels[0]["ms"] == 0.004 and kernels[0]["launches"] == 2
    assert sum(kernel["ms"] for kernel in kernels) == pytest.approx(sum(totals.values()))
    with pytest.raises(ValueError, match="6 markers in 2 steps of 6"):
        step_stages.by_stage(timeline(*one), marks, 2)


def test_a_trace_is_read():
    events = [
        {"cat": "kernel", "name": "a", "ts": 1.0, "dur": 2.0},
        {"cat": "gpu_memset", "name": "b", "ts": 3.0, "dur": 1.0},
        {"cat": "cpu_op", "name": "c", "ts": 3.0, "dur": 1.0},
        {"name": "d"},
    ]
    found = step_stages.device_events({"traceEvents": events})
    assert found == [Kernel("a", 1.0, 2.0), Kernel("b", 3.0, 1.0)]


SPARSE_ORDER = [
    "encoder product",
    "selection",
    "decode",
    "loss",
    "dW_dec + dvalues",
    "transposition",
    "dW_enc",
]


@pytest.mark.parametrize("trainer", step_ours.TRAINERS)
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_the_stages_of_our_steps_are_marked(trainer, path):
    launched = []
    marker = Marker(lambda: launched.append(1))
    batches = [torch.randn(SMALL[:2]) for _ in range(2)]
    before = {owner: dict(vars(owner)) for owner in (step_ours.Trainer, sys.modules["softsae.step"].Step)}
    with step_stages.staged(marker, "cpu"):
        run = step_ours.training(SMALL, trainer, path, "bfloat16", "cpu", batches)
        step_ours.do_steps(run, batches, 3)
        steps_launched = len(launched)
        step_ours.do_steps(run, batches, 1)
    assert len(launched) - steps_launched == len(marker.marks)  # the marks are those of one step
    entered = [stage for what, stage in marker.marks if what == "enter"]
    inside = []
    for what, stage in marker.marks:
        assert stage in step_stages.STAGES
        if what == "enter":
            inside.append(stage)
        elif what == "leave":
            assert inside.pop() == stage
    assert inside == []
    expected = [*SPARSE_ORDER, "clip", "Adam"] if path == "sparse" else ["encoder product", "selection"]
    estimated = {"estimator", "estimator backward"} if trainer != TOPK else set()
    gate = {"gate"} if path == "sparse" and trainer != TOPK else set()
    assert [stage for stage in entered if stage in expected] == expected
    assert {"decode", "loss", "clip", "Adam", *estimated, *gate} <= set(entered)
    assert estimated or not {"estimator", "estimator backward"} & set(entered)
    after = {owner: dict(vars(owner)) for owner in before}
    assert before == after
    step_ours.do_steps(run, batches, 1)
    assert len(launched) == steps_launched + len(marker.marks)  # nothing is marked any more


def test_a_failing_trainer_is_a_row_that_says_so():
    keys = step.row_of(SMALL, WIDE, step.OURS, "sparse", "bfloat16")

    def failing() -> dict:
        raise torch.cuda.OutOfMemoryError("no memory\nat all")

    row = step.measured(failing, keys, "cpu")
    assert row["ms"] is None and row["error"] == "OutOfMemoryError: no memory"
    assert "no memory" in step.line(row)


def test_the_command_runs_and_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    path = tmp_path / "step-cpu.json"
    monkeypatch.setattr(step, "BLOCKS", 1)
    command = ["step", "--device", "cpu", "--quick", "--shapes", "0", "--peers", "--out", str(path)]
    monkeypatch.setattr("sys.argv", [*command, "--ours", WIDE, "--paths", "sparse", "dense"])
    step.main()
    before = json.loads(path.read_text())["rows"]
    assert {(row["trainer"], row["path"], row["took"]) for row in before} == {
        (WIDE, "sparse", "sparse"),
        (WIDE, "dense", "dense"),
    }
    for row in before:
        assert row["ms"] > 0 and row["commit"] and row["skipped"] == 0
        assert sum(row["floor_parts"].values()) == pytest.approx(row["floor_ms"], abs=1e-4)
    monkeypatch.setattr("sys.argv", [*command, "--ours", TOPK, "--paths", "auto"])
    step.main()
    after = json.loads(path.read_text())["rows"]
    assert [row for row in after if row["trainer"] == WIDE] == before and len(after) == 3
    assert "error" not in capsys.readouterr().out.lower()


def test_files_hold_peers_and_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(sparse_plots, "RESULTS", tmp_path)
    path = tmp_path / "step-h200.json"
    rows = rows_that_meet()
    parts = sparse_bars.step_floor_ms(*STEP_SHAPES[0], 4096, 4.25e12)
    stages = {"stages": {"decode": 0.5, "Adam": 0.3}, "idle_ms": 0.2, "floor_parts": parts, "kernels": []}
    rows[2] |= stages | {"fraction": 0.48}
    step.update(path, "cuda", rows, {"TopK, sparsify": "absent: why"})
    data = json.loads(path.read_text())
    assert all(bar["met"] for bar in data["bars"])
    wide = next(row for row in data["rows"] if "stages" in row)
    assert wide["peers"] == {f"{SOFTSAE_REFERENCE}, TF32": 100.0, f"{TOPK_REFERENCE}, TF32": 2.5}
    picture = tmp_path / "step-h200-stages.png"
    page = tables.step()
    assert "17 of 17 bars are met." in page and f"(results/{picture.name})" in page and "100×" in page
    assert sparse_plots.stale() == [picture]
    sparse_plots.draw()
    assert sparse_plots.stale() == []
    # A row that is measured again without its stages keeps them.
    again = {key: value for key, value in rows[2].items() if key not in ("stages", "idle_ms", "kernels")}
    step.update(path, "cuda", [{**again, "ms": 60.0}], {})
    data = json.loads(path.read_text())
    assert next(row for row in data["rows"] if "stages" in row)["ms"] == 60.0
    assert sum(not bar["met"] for bar in data["bars"]) == 2 and "✗" in tables.step()


def test_the_summary_has_a_line_for_every_shape_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = rows_that_meet()
    forced = next(row for row in rows if row["trainer"] == WIDE)  # of the first shape
    chosen = forced | {"path": "auto", "took": "dense", "ms": 1.25, "commit": "0123456789ab"}
    first = "| 8192, 512, 4096, 220 | 1.25 ms | dense |"

    def lines(rows: list[dict]) -> list[str]:
        (tmp_path / tables.STEP_FILE).write_text(json.dumps({"rows": rows}))
        return tables.step_summary().splitlines()[2:]  # below the header

    assert lines([*rows, chosen]) == [f"{first} 100 ms (80×) | 2.5 ms (2×) | 0.20 | 0123456 |"]
    assert lines([chosen]) == [f"{first} – | – | – | 0123456 |"]
    assert lines(rows) == [] and tables.step_summary() == tables.NOTHING  # none chose its path


def test_peers_are_entered_without_their_init(tmp_path, monkeypatch):
    package = tmp_path / "far"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("import nothing_that_exists")
    (package / "inner" / "__init__.py").write_text("import nothing_that_exists")
    (package / "inner" / "part.py").write_text(
        "from far.other import value\nfrom ..other import value as same"
    )
    (package / "other.py").write_text("value = 7")
    for name in ("far", "far.inner"):
        monkeypatch.setitem(sys.modules, name, None)
    step_peers.entered("far", package)
    step_peers.entered("far.inner", package / "inner")
    part = step_peers.importlib.import_module("far.inner.part")
    assert part.value == part.same == 7
    with pytest.raises(ImportError, match="has no folder inner"):
        step_peers.entered("farther", tmp_path / "inner")
    for name in ("far.inner.part", "far.other"):
        sys.modules.pop(name, None)


def test_absent_trainers_say_why(monkeypatch):
    for name in ("SOFTSAE", "DICTIONARY_LEARNING", "SPARSIFY", "SAELENS", "LAPSUM"):
        monkeypatch.delenv(f"SOFTTOPK_PEER_{name}", raising=False)
    peers, found = step_peers.load("cpu")
    assert peers == [] and set(found) == set(step_peers.PEERS)
    assert "SOFTTOPK_PEER_DICTIONARY_LEARNING is not set" in found[TOPK_REFERENCE]


def test_a_peer_is_timed():
    seen = []

    def make(rows, d, n, k, device):
        weight = torch.zeros(n, d)
        return step_peers.Training(lambda number, x: seen.append((number, x.shape)), [weight])

    which = step_peers.Peer("another", "1", make, ("float32", "TF32"))
    row = step.peer(which, SMALL, "TF32", "cpu", 2)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    assert row["ms"] >= 0 and row["trainer"] == row["implementation"] == "another"
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert {shape for _, shape in seen} == {SMALL[:2]}


def test_curves_are_compared():
    dense = [10.0, 8.0, 6.0, 4.0, 2.0, 2.0, 2.0]
    other = [value * 1.01 for value in dense]
    other[5] *= 2
    difference, at = curves.largest_difference(other, dense)
    means = [(sum(other[i : i + 5]), sum(dense[i : i + 5])) for i in range(3)]
    assert difference == pytest.approx(max(a / b - 1 for a, b in means)) and at == 70
    assert curves.largest_difference(dense, dense)[0] == 0
    rows = [{"losses": dense}, {"losses": other}]
    curves.compare(rows)
    assert "largest_difference" not in rows[0] and rows[1]["at_step"] == 70


def test_curves_of_a_short_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    path = tmp_path / "curves-cpu.json"
    command = ["curves", "--quick", "--device", "cpu", "--ways", "sparse float32", "--out", str(path)]
    monkeypatch.setattr("sys.argv", command)
    curves.main()
    data = json.loads(path.read_text())
    dense, sparse = data["rows"]
    assert (dense["name"], sparse["name"]) == ("dense float32", "sparse float32")
    assert len(dense["losses"]) == dense["steps"] // curves.EVERY
    assert sparse["losses"][0] == pytest.approx(dense["losses"][0], rel=1e-4)
    assert dense["losses"][-1] < dense["losses"][0] / 1.5
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert f"{sparse['largest_difference']:.2%}" in tables.curves()
