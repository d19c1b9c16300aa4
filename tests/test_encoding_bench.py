"""The benchmark of encoding: its data look like an autoencoder's, everything is checked and measured, parts
are merged, the tables show the file. Nothing here is timed against anything."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import encoding, encoding_data, encoding_tables, sparse_tables
from benchmarks.encoding import BOTH, DENSE, ENCODE, PRODUCT, SHARDS, SOFTSAE, SPARSE, TOPK, TORCH, TORCH_TOPK
from softsae.activations import as_source

ROWS, N, D, K = 32, 512, 64, 8
DTYPES = (torch.float32, torch.bfloat16)


def size_of(dtype: torch.dtype = torch.float32) -> encoding.Size:
    return encoding.Size(ROWS, N, D, K, dtype, "cpu")


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def weights(request) -> encoding_data.Weights:
    return encoding_data.draw_weights(2 * N, D, request.param, "cpu").first(N)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(encoding, "BUDGET_S", {"cpu": 1e-4})


def test_pre_activations_look_like_an_autoencoder_s():
    weights = encoding_data.draw_weights(4096, 768, torch.float32, "cpu")
    x = encoding_data.draw_activations(64, K, weights)
    pre = F.linear(x - weights.b_dec, weights.W_enc, weights.b_enc)
    assert 0.02 < (pre > 0).double().mean() < 0.4 and (pre != 0).all()
    largest, others = pre.topk(K + 1).values[:, :K], pre.topk(K + 1).values[:, K]
    assert largest.mean() > 1.5 * others.mean()
    norms = torch.stack([weights.W_dec.norm(dim=1), weights.W_enc.norm(dim=1)])
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert weights.W_enc.data_ptr() != weights.W_dec.data_ptr()


def test_a_softsae_s_budgets_lie_about_k():
    weights = encoding_data.draw_weights(1024, 256, torch.float32, "cpu")
    sae = encoding_data.autoencoder("softsae", 64, weights)
    x = encoding_data.draw_activations(500, 64, weights)
    budgets = sae(x).k_hat
    assert 0.7 * 64 < budgets.mean() < 1.4 * 64 and budgets.std() > 2
    assert sae.W_dec.data_ptr() == weights.W_dec.data_ptr()
    assert all(value.isfinite().all() for value in sae.state_dict().values())


def test_shards_hold_the_activations(tmp_path, weights):
    batches = [encoding_data.draw_activations(ROWS, K, weights, seed) for seed in range(5)]
    source = as_source(encoding_data.write_shards(tmp_path / "acts", batches, 2 * ROWS))
    assert len(source.manifest["shards"]) == 3 and len(source.token_ids) == 5 * ROWS
    assert torch.equal(torch.cat(list(source.in_order(7))), torch.cat(batches).float())


def test_everything_is_checked_and_measured(tmp_path, weights):
    batches = [encoding_data.draw_activations(ROWS, K, weights, seed) for seed in range(3)]
    folder = encoding_data.write_shards(tmp_path / "acts", batches, ROWS)
    size = size_of(weights.W_enc.dtype)
    rows = encoding.rows_of(size, weights, folder)
    ours = {(m, p, op) for m in (TOPK, SOFTSAE) for p in (SPARSE, DENSE) for op in (ENCODE, BOTH)}
    ours |= {(m, SPARSE, SHARDS) for m in (TOPK, SOFTSAE)}
    peers = {(TORCH, PRODUCT, ENCODE), (TORCH, TORCH_TOPK, ENCODE), (TORCH, TORCH_TOPK, BOTH)}
    assert {(row["model"], row["path"], row["op"]) for row in rows} == ours | peers
    for row in rows:
        assert encoding.wrong(row) is None and row["ms"] > 0
        tokens = row["tokens"] if row["op"] == SHARDS else ROWS
        assert row["tokens_per_s"] == pytest.approx(tokens / row["ms"] * 1e3, rel=0.02)
        assert row["op"] == SHARDS or row["fraction"] > 0
        assert row["path"] == PRODUCT or row["op"] == SHARDS or row["max_error"] is not None
        if row["model"] == TOPK:
            assert row["active"] == K
        if row["op"] == SHARDS:
            entries = 3 * ROWS * row["active"]
            assert row["tokens"] == 3 * ROWS and row["bytes_written"] > entries * (4 + size.dtype.itemsize)
            assert row["bytes_read"] == 3 * ROWS * D * size.dtype.itemsize
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("path", [SPARSE, DENSE])
@pytest.mark.parametrize(
    "spoilt, op", [("W_enc", ENCODE), ("b_enc", ENCODE), ("W_dec", BOTH), ("b_dec", BOTH)]
)
def test_a_wrong_result_is_seen(path, op, spoilt):
    weights = encoding_data.draw_weights(N, D, torch.float32, "cpu")
    xs = [encoding_data.draw_activations(ROWS, K, weights)]
    exact = encoding.Exact.of(xs[0], weights)
    wrong = weights._replace(**{spoilt: getattr(weights, spoilt) * 1.01})
    sae = encoding_data.autoencoder("topk", K, wrong)
    with torch.no_grad():
        row, calls = encoding.ours(size_of(), TOPK, path, op, sae, xs, exact)
    assert len(calls) == 1 and "error" in encoding.wrong(row)
    assert "WRONG" in encoding.line(row | {"ms": 1.0, "tokens_per_s": ROWS * 1000})


def test_entries_that_are_missing_are_an_error():
    weights = encoding_data.draw_weights(N, D, torch.float32, "cpu")
    x = encoding_data.draw_activations(ROWS, K, weights)
    exact = encoding.Exact.of(x, weights)
    latents, budgets = encoding_data.autoencoder("topk", K, weights).encode(x), torch.full((ROWS,), K)
    assert exact.code_error(latents, budgets) < 1e-6
    other = latents * (latents < latents.amax(1, keepdim=True))  # K - 1 entries, not the largest ones
    assert exact.code_error(other, budgets) > 1e-2
    with pytest.raises(RuntimeError, match="entries in place of"):
        exact.code_error(latents, budgets + 2)


def test_on_a_cpu_all_take_turns():
    seen = []
    cases = [[lambda name=f"{case}{i}": seen.append(name) for i in range(2)] for case in "ab"]
    times = encoding.times_ms(cases, "cpu")
    assert len(times) == 2 and seen[:6] == ["a0", "b0", "a1", "b1", "a0", "b0"]
    assert len(seen) >= 2 * encoding.ROUNDS[0]


def test_what_cannot_be_measured_says_why():
    def broken(size, *arguments):
        raise torch.OutOfMemoryError("no memory")

    row, calls = encoding.tried(broken, size_of(), TOPK, SPARSE, ENCODE)
    assert calls == []
    assert row["ms"] is None and encoding.wrong(row) == "OutOfMemoryError: no memory"
    assert row["error"] in encoding.line(row)


def test_the_command_measures_a_part_and_the_tables_show_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sparse_tables, "RESULTS", tmp_path)
    assert encoding_tables.encoding() == sparse_tables.NOTHING
    path = tmp_path / "encoding-cpu.json"
    command = ["encoding", "--device", "cpu", "--quick", "--out", str(path)]
    monkeypatch.setattr("sys.argv", [*command, "--no-shards"])
    encoding.main()
    before = json.loads(path.read_text())["rows"]
    assert {row["n"] for row in before} == {256, 1024} and SHARDS not in {row["op"] for row in before}
    monkeypatch.setattr("sys.argv", [*command, "--lengths", "256"])
    encoding.main()
    data = json.loads(path.read_text())
    assert [row for row in data["rows"] if row["n"] == 1024] == [row for row in before if row["n"] == 1024]
    assert len(data["rows"]) == len(before) + 2 and all("commit" in row for row in data["rows"])
    assert "could not be measured" not in capsys.readouterr().out
    page = encoding_tables.encoding()
    assert "✗" not in page and page.count("| encode + decode |") == 5 and "MiB" not in page
    rows = [row for row in data["rows"] if row["op"] == ENCODE]
    slow, failed = (next(r for r in rows if (r["model"], r["path"]) == (TOPK, p)) for p in (SPARSE, DENSE))
    slow |= {"tokens_per_s": 1234567, "fraction": 0.5, "max_error": 1.0, "peak_bytes": 3 << 20}
    failed |= {"ms": None, "error": "a"}
    encoding.update(path, data["rows"])
    page = encoding_tables.encoding()
    assert "| 1,235 (50%) ✗ |" in page and "| error ✗ |" in page and "| 3 ✗ |" in page
