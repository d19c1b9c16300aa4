"""Activations of a language model as a folder of safetensors shards with a manifest.

    manifest.json            model, revision, layer, hook point, d, dtype, rows, shards with checksums
    shard-00000.safetensors  activations (m, d), sequence (m,) int32, position (m,) int32
    sequences.safetensors    token_ids (T,) int32, offsets (S + 1,) int64, document (S,) int32
    documents.json           the documents' names
    scores.npy               where they were asked for: what the language model lost at each row's token

Row i comes from token `position[i]` of sequence `sequence[i]`, so every activation can be shown in
its text. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softsae.activations.rows import RowSource
from softsae.sequences import Sequences

FORMAT = "softsae activations 1"
MANIFEST = "manifest.json"
SCORES = "scores.npy"
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BYTES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


class ShardWriter:
    """Writes a folder of shards; a context manager that leaves the whole folder or nothing.

    Args:
        out: the folder to make; it must not exist, or be empty.
        d: width of the activations.
        dtype: "float32", "bfloat16" or "float16".
        shard_rows: rows per shard.

    Raises:
        FileExistsError: `out` holds something.
        ValueError: an unknown dtype, shard_rows < 1; in `add`, activations that do not fit in dtype.
    """

    def __init__(self, out: str | Path, d: int, dtype: str = "float32", shard_rows: int = 65536):
        if dtype not in STORED:
            raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(STORED)}")
        if shard_rows < 1:
            raise ValueError(f"shard_rows={shard_rows} must be at least 1")
        self.out, self.d, self.dtype, self.shard_rows = Path(out), d, dtype, shard_rows
        require_empty(self.out)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self.waiting = self.rows = 0
        self.shards: list[dict] = []

    def __enter__(self) -> ShardWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
        return self

    def __exit__(self, kind, error, trace) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # after `finish` there is nothing left of it

    def add(self, activations: Tensor, sequence: Tensor, position: Tensor) -> None:
        """Rows (m, d) with the sequence (m,) and the position (m,) of each."""
        stored = activations.to("cpu", STORED[self.dtype])
        if not torch.isfinite(stored).all():
            largest = activations.abs().max().item()
            raise ValueError(
                f"activations up to {largest:.3g} do not fit in {self.dtype}; choose float32 or bfloat16"
            )
        self.pending.append((stored, sequence.to("cpu", torch.int32), position.to("cpu", torch.int32)))
        self.waiting += len(stored)
        while self.waiting >= self.shard_rows:
            self._write(self.shard_rows)

    def finish(self, sequences: Sequences, scores: np.ndarray | None = None, **about) -> Path:
        """Writes the rest, the sequences, scores (rows,) and the manifest with `about` in it.

        Then the folder appears.
        """
        if self.waiting:
            self._write(self.waiting)
        if not self.rows:
            raise ValueError("no activation was collected: every position was excluded")
        tensors = {
            "token_ids": torch.from_numpy(sequences.token_ids),
            "offsets": torch.from_numpy(np.asarray(sequences.offsets, dtype=np.int64)),
            "document": torch.from_numpy(sequences.document),
        }
        save(tensors, self.folder / "sequences.safetensors")
        (self.folder / "documents.json").write_text(json.dumps(sequences.names))
        names = ["sequences.safetensors", "documents.json"]
        if scores is not None:
            np.save(self.folder / SCORES, scores)
            names.append(SCORES)
        files = {file: describe(self.folder / file) for file in names}
        manifest = {
            "format": FORMAT, **about, "d": self.d, "dtype": self.dtype, "rows": self.rows,
            "sequences": len(sequences), "tokens": sequences.tokens, "shards": self.shards, "files": files,
        }  # fmt: skip
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        self.folder.chmod(0o755)  # mkdtemp makes it private
        os.replace(self.folder, self.out)
        return self.out

    def _write(self, rows: int) -> None:
        joined = [torch.cat(parts) for parts in zip(*self.pending, strict=True)]
        rest = [part[rows:] for part in joined]
        names = ("activations", "sequence", "position")
        tensors = {name: part[:rows].contiguous() for name, part in zip(names, joined, strict=True)}
        file = f"shard-{len(self.shards):05d}.safetensors"
        save(tensors, self.folder / file)
        self.shards.append({"file": file, "rows": rows, **describe(self.folder / file)})
        self.pending = [tuple(rest)] if len(rest[0]) else []
        self.rows += rows
        self.waiting -= rows


class ShardSource(RowSource):
    """A folder written by `ShardWriter`: shuffled batches, and the text behind every row.

    Attributes: `manifest` (dict), `rows`, `d`, `sequence` and `position` ((rows,) int32, loaded when
    first used), `sequences` (`Sequences`).

    Args:
        folder: the folder with manifest.json.
        verify: compare every shard's SHA-256 with the manifest (reads everything once).

    Raises:
        FileNotFoundError: no manifest, or a shard that is missing.
        ValueError: a manifest of another format, a shard with another size, checksum or contents.
    """

    def __init__(self, folder: str | Path, verify: bool = False):
        self.folder = Path(folder)
        self.name = str(folder)
        self.manifest = read_manifest(self.folder)
        self.d, self.rows = self.manifest["d"], self.manifest["rows"]
        listed = self.manifest["shards"] + [
            {"file": file, **about} for file, about in self.manifest["files"].items()
        ]
        for entry in listed:
            check_file(self.folder / entry["file"], entry, verify)
        self.starts = np.cumsum([0] + [shard["rows"] for shard in self.manifest["shards"]])
        if self.starts[-1] != self.rows:
            raise ValueError(f"{self.name}/{MANIFEST}: shards hold {self.starts[-1]} rows, not {self.rows}")
        self.maps = [self._map(shard) for shard in self.manifest["shards"]]
        self._labels: dict[str, np.ndarray] = {}
        self._sequences: Sequences | None = None

    def read(self, rows: np.ndarray) -> Tensor:
        out = torch.empty(len(rows), self.d)
        edges = np.searchsorted(rows, self.starts)
        for shard, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            if first < last:
                part = torch.from_numpy(self.maps[shard][rows[first:last] - self.starts[shard]])
                out[first:last] = part.view(STORED[self.manifest["dtype"]])
        return out

    def place(self, row: int) -> str:
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"row {row - self.starts[shard]} of {self.folder / self.manifest['shards'][shard]['file']}"

    @property
    def sequence(self) -> np.ndarray:
        return self._label("sequence")

    @property
    def position(self) -> np.ndarray:
        return self._label("position")

    @property
    def token_ids(self) -> np.ndarray:
        """(rows,) int32: the token of every row."""
        sequences = self.sequences
        return sequences.token_ids[sequences.offsets[self.sequence] + self.position]

    @property
    def sequences(self) -> Sequences:
        if self._sequences is None:
            tensors = {
                name: tensor.numpy()
                for name, tensor in load_file(self.folder / "sequences.safetensors").items()
            }
            names = json.loads((self.folder / "documents.json").read_text())
            self._sequences = Sequences(names=names, **tensors)
        return self._sequences

    def _label(self, name: str) -> np.ndarray:
        if name not in self._labels:
            files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
            self._labels[name] = np.concatenate([np.array(map_tensor(file, name)) for file in files])
        return self._labels[name]

    def _map(self, shard: dict) -> np.ndarray:
        file = self.folder / shard["file"]
        found = map_tensor(file, "activations")
        if found.shape != (shard["rows"], self.d) or found.dtype != BYTES[self.manifest["dtype"]]:
            raise ValueError(
                f"shard {str(file)!r} holds {found.shape} {found.dtype},"
                f" {MANIFEST} says {(shard['rows'], self.d)} {self.manifest['dtype']}"
            )
        return found


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder of shards, checked for format and fields."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder of activations: no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest["dtype"] not in STORED:
            raise ValueError(f"dtype is {manifest['dtype']!r}, not one of {', '.join(STORED)}")
        for field in ("d", "rows", "shards", "files"):
            manifest[field]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} cannot be used: {error!r}") from None
    return manifest


def check_file(file: Path, entry: dict, verify: bool) -> None:
    """Raises when a file is missing, of another size, or (verify) of another checksum."""
    if not file.is_file():
        raise FileNotFoundError(f"shard {str(file)!r} is missing")
    size = file.stat().st_size
    if size != entry["bytes"]:
        kind = "truncated" if size < entry["bytes"] else "changed"
        raise ValueError(f"shard {str(file)!r} is {kind}: {size} bytes, {MANIFEST} says {entry['bytes']}")
    if verify and describe(file)["sha256"] != entry["sha256"]:
        raise ValueError(f"shard {str(file)!r} is changed: its SHA-256 is not the one in {MANIFEST}")


def save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file)
    file.chmod(0o644)  # the library makes it private


def describe(file: Path) -> dict:
    with open(file, "rb") as opened:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
        }


def map_tensor(file: Path, name: str) -> np.ndarray:
    """A tensor of a safetensors file as a memory map; bfloat16 as uint16.

    The format: 8 bytes with the header's length, the header in JSON with dtype, shape and byte
    offsets of every tensor, the data.
    """
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.int32, "I64": np.int64}
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            entry = json.loads(opened.read(length))[name]
        offset = 8 + length + entry["data_offsets"][0]
        return np.memmap(file, kinds[entry["dtype"]], "r", offset, tuple(entry["shape"]))
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"shard {str(file)!r} cannot be read: {error!r}") from None


def require_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"folder {str(folder)!r} is not empty: choose another --out or remove it")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} exists and is not a folder")
