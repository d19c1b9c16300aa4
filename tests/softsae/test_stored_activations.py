"""Stored activations: .npy files and shards read back exactly, shuffled globally, and checked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from softsae.activations import as_source
from softsae.activations.npy import NpySource
from softsae.activations.shards import ShardSource, ShardWriter
from softsae.activations.shuffle import Shuffle
from softsae.sequences import Sequences


def rows_of(count: int, d: int = 3) -> np.ndarray:
    """Row i is (i, i + 0.25, i + 0.5, ...): every row can be told from every other."""
    return (np.arange(count)[:, None] + 0.25 * np.arange(d)).astype(np.float32)


@pytest.fixture
def npy(tmp_path):
    np.save(tmp_path / "x.npy", rows_of(1000))
    return tmp_path / "x.npy"


def sequences_of(count: int, length: int) -> Sequences:
    return Sequences(
        token_ids=np.arange(count * length, dtype=np.int32),
        offsets=np.arange(count + 1) * length,
        document=np.zeros(count, dtype=np.int32),
        names=["only"],
    )


@pytest.fixture
def shards(tmp_path):
    """1000 rows in 4 shards; row i comes from position i % 10 + 2 of sequence i // 10 of 12 tokens."""
    x, i = torch.from_numpy(rows_of(1000)), torch.arange(1000)
    with ShardWriter(tmp_path / "acts", 3, shard_rows=300) as writer:
        for part in torch.split(torch.arange(1000), 170):
            writer.add(x[part], i[part] // 10, i[part] % 10 + 2)
        writer.finish(sequences_of(100, 12), model="m", layer=1)
    return tmp_path / "acts"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_shuffle_is_a_permutation_of_every_epoch(n):
    order = Shuffle(n, seed=7)
    first, second = order.rows(0, n), order.rows(n, n)
    assert sorted(first) == sorted(second) == list(range(n))
    if n > 16:
        assert (first != second).any() and (first != Shuffle(n, seed=8).rows(0, n)).any()
    assert (order.rows(n // 2, n) == np.concatenate([first, second])[n // 2 : n // 2 + n]).all()


def test_shuffle_leaves_no_order_behind():
    """Neighbours in a shuffled order are as far apart as in a random one: n / 3 in the mean."""
    rows = Shuffle(100_000, seed=1).rows(0, 100_000)
    assert abs(np.abs(np.diff(rows)).mean() / 100_000 - 1 / 3) < 0.005
    assert abs(np.corrcoef(rows, np.arange(100_000))[0, 1]) < 0.02


@pytest.mark.parametrize("kind", ["npy", "shards"])
def test_batches_cover_each_epoch_once_and_start_anywhere(kind, request, monkeypatch):
    source = as_source(request.getfixturevalue(kind))
    assert source.d == 3 and len(source) == 1000
    stream = source.batches(64, seed=3)
    served = [next(stream) for _ in range(40)]
    assert all(b.shape == (64, 3) and b.dtype == torch.float32 for b in served)
    rows = torch.cat(served)[:, 0]
    assert sorted(rows[:1000].tolist()) == list(range(1000)) == sorted(rows[1000:2000].tolist())
    assert torch.equal(torch.cat(served)[:, 2], rows + 0.5)
    resumed = source.batches(64, seed=3, start=17)
    assert all(torch.equal(next(resumed), batch) for batch in served[17:])
    assert not torch.equal(next(source.batches(64, seed=4)), served[0])
    monkeypatch.setattr("softsae.activations.rows.BLOCK_BYTES", 1)  # one batch at a time: same batches
    small = source.batches(64, seed=3)
    assert all(torch.equal(next(small), batch) for batch in served)
    assert source.locate(64, 3, 5, 9) == source.place(int(served[5][9, 0]))


def test_batches_larger_than_the_source(tmp_path):
    np.save(tmp_path / "x.npy", rows_of(5))
    batch = next(NpySource(tmp_path / "x.npy").batches(12, seed=0))
    assert sorted(batch[:5, 0].tolist()) == sorted(batch[5:10, 0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_npy_dtypes(tmp_path, dtype):
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    read = torch.cat(list(NpySource(tmp_path / "x.npy").in_order(7)))
    assert torch.equal(read, torch.from_numpy(x.astype(np.float32)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4, np.float32), r"shape \(4,\)"),
        (np.zeros((2, 3, 4), np.float32), r"shape \(2, 3, 4\)"),
        (np.zeros((0, 4), np.float32), r"shape \(0, 4\)"),
        (np.zeros((2, 4), np.int64), "dtype int64"),
        (np.asfortranarray(np.zeros((2, 4), np.float32)), "C order"),
    ],
)
def test_npy_of_the_wrong_kind_is_refused_by_name(tmp_path, array, message):
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(ValueError, match=message) as error:
        as_source(tmp_path / "bad.npy")
    assert "bad.npy" in str(error.value)


def test_npy_truncated_missing_or_no_npy_at_all(npy, tmp_path):
    data = npy.read_bytes()
    npy.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"x.npy.*truncated: {len(data) - 1} bytes, {len(data)} needed"):
        as_source(str(npy))
    npy.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="x.npy' is not an .npy file"):
        as_source(npy)
    with pytest.raises(FileNotFoundError, match="absent.npy"):
        as_source(tmp_path / "absent.npy")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        as_source(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_return_what_was_written(tmp_path, dtype):
    torch.manual_seed(0)
    x = torch.randn(100, 8) * 30
    with ShardWriter(tmp_path / "a", 8, dtype, shard_rows=32) as writer:
        writer.add(x, torch.arange(100) // 10, torch.arange(100) % 10)
        writer.finish(sequences_of(10, 10))
    source = ShardSource(tmp_path / "a", verify=True)
    assert [s["rows"] for s in source.manifest["shards"]] == [32, 32, 32, 4]
    assert torch.equal(torch.cat(list(source.in_order(33))), x.to(getattr(torch, dtype)).float())
    assert source.token_ids.tolist() == list(range(100))


def test_shards_know_the_token_of_every_row(shards):
    source = ShardSource(shards)
    i = np.arange(1000)
    assert (source.sequence == i // 10).all() and (source.position == i % 10 + 2).all()
    assert (source.token_ids == i // 10 * 12 + i % 10 + 2).all()
    assert source.place(299).endswith("row 299 of " + str(shards / "shard-00000.safetensors"))
    assert source.place(300).endswith("row 0 of " + str(shards / "shard-00001.safetensors"))


def test_a_missing_truncated_or_changed_shard_is_named(shards):
    victim = shards / "shard-00002.safetensors"
    data = victim.read_bytes()
    victim.write_bytes(data[:-4])
    with pytest.raises(ValueError, match="shard-00002.*truncated"):
        as_source(shards)
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    as_source(shards)  # the size fits
    with pytest.raises(ValueError, match="shard-00002.*SHA-256"):
        ShardSource(shards, verify=True)
    victim.unlink()
    with pytest.raises(FileNotFoundError, match="shard-00002.*missing"):
        as_source(shards)


def test_a_manifest_of_another_kind_is_refused(shards):
    file = shards / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "format": "other 7"}))
    with pytest.raises(ValueError, match="manifest.json.*other 7"):
        as_source(shards)
    file.write_text(json.dumps({**manifest, "rows": 7}))
    with pytest.raises(ValueError, match="1000 rows, not 7"):
        as_source(shards)
    file.write_text("{")
    with pytest.raises(ValueError, match="manifest.json"):
        as_source(shards)


def test_a_writer_leaves_the_whole_folder_or_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a", 3, shard_rows=4) as writer:
        writer.add(torch.zeros(10, 3), torch.zeros(10), torch.zeros(10))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(tmp_path / "a", 3, "float16") as writer:
        with pytest.raises(ValueError, match="1e\\+05 do not fit in float16"):
            writer.add(torch.full((2, 3), 1e5), torch.zeros(2), torch.zeros(2))
        with pytest.raises(ValueError, match="every position was excluded"):
            writer.finish(sequences_of(1, 2))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="full.*not empty"):
        ShardWriter(tmp_path / "full", 3)


def test_nonfinite_rows_are_named_and_refused_or_left_out(tmp_path):
    x = rows_of(100)
    x[41, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    source = NpySource(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="NaN or infinity: row 41 of .*x.npy"):
        list(source.in_order(30))
    assert len(torch.cat(list(source.in_order(30, nonfinite="skip")))) == 99


def test_training_names_the_row_of_a_nonfinite_activation(tmp_path):
    from softsae import AutoencoderConfig, TrainConfig, Trainer

    x = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    x[41, 1] = np.inf
    np.save(tmp_path / "x.npy", x)
    model = AutoencoderConfig(n=8, k=2, architecture="topk")
    train = TrainConfig(steps=10, batch_size=32, device="cpu")
    with pytest.raises(ValueError, match="row 41 of .*x.npy"):
        Trainer(model, train, progress=False).fit(str(tmp_path / "x.npy"))
