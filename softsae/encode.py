"""The codes of stored activations: a folder of safetensors shards that grows batch by batch.

    manifest.json        rows, n, how they were encoded, the shards
    codes-00000.safetensors   counts (m,) int32, indices (T,) int32, values (T,), T = sum of counts

Rows stand in the order of the activations, one after the other: those of a row begin where the counts of the
rows before it end, its latents ascending. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from softsae.activations import as_source, widths
from softsae.activations.shards import MANIFEST, STORED, require_empty, save
from softtopk import SparseCode, dispatch
from softtopk.sparse_code import Transposition

if TYPE_CHECKING:
    from softsae.autoencoder import SparseAutoencoder
    from softsae.options import EncodeOptions

FORMAT = "softsae codes 1"


@torch.no_grad()
def encode_source(
    sae: SparseAutoencoder,
    source,
    out: str | Path,
    *,
    k: float | None = None,
    batch_size: int = 4096,
    shard_rows: int = 2**20,
    dtype: str = "float32",
    limit: int | None = None,
) -> Path:
    """Write the codes of activations, with the hard selection, to a folder; returns it.

    The memory it needs is that of a batch and a shard of codes, however many activations there are.

    Args:
        sae: the autoencoder, on the device that is to do it and in the dtype of its products
            (`sae.bfloat16()`).
        source: activations as `Trainer.fit` takes them. A tensor and stored activations are encoded once and
            in order, of a source without an end as many batches as `limit` says.
        out: the folder to make; it must not exist, or be empty.
        k: keep the k largest activations of each sample in place of what the rule selects.
        batch_size: samples encoded at once. shard_rows: samples in a file.
        dtype: "float32", "bfloat16" or "float16", of the stored values.
        limit: of batches; None is all.

    Raises:
        FileExistsError: `out` holds something.
        ValueError: activations of another width, NaN or infinite ones, an unknown dtype, a source without
            an end and no limit.
    """
    tensor = source if isinstance(source, Tensor) else None
    source = as_source(source)
    if (found := widths(source)[0]) != sae.config.d:
        raise ValueError(f"the activations have d={found}, the autoencoder d={sae.config.d}")
    if dtype not in STORED:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(STORED)}")
    if tensor is not None:
        batches = tensor.split(batch_size)
    elif hasattr(source, "in_order"):
        batches = source.in_order(batch_size)
    elif limit is None:
        raise ValueError("limit=None: the source has no end, say how many of its batches are encoded")
    else:
        batches = source.batches(batch_size, 0, 0)
    out = Path(out)
    require_empty(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        shards = list(written(folder, codes_of(sae, batches, k, limit), shard_rows, STORED[dtype]))
        manifest = {
            "format": FORMAT, "n": sae.config.n, "architecture": sae.config.architecture, "k": k,
            "dtype": dtype, "rows": sum(shard["rows"] for shard in shards), "shards": shards,
        }  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        folder.chmod(0o755)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def codes_of(
    sae: SparseAutoencoder, batches: Iterable[Tensor], k: float | None, limit: int | None
) -> Iterator[dict[str, Tensor]]:
    """The packed codes of batches, on the CPU."""
    for number, batch in enumerate(batches):
        if number == limit:
            return
        x, _ = sae.split(batch)
        x = x.to(sae.b_dec.device, sae.b_dec.dtype)
        if not x.isfinite().all():
            raise ValueError(f"activations hold NaN or infinity in batch {number}")
        yield packed(sae.encode(x, k=k, sparse=True))


def packed(code: SparseCode) -> dict[str, Tensor]:
    """The entries of a code that are not 0, row after row."""
    kept = code.values != 0
    return {
        "counts": kept.sum(1, dtype=torch.int32).cpu(),
        "indices": code.indices[kept].cpu(),
        "values": code.values[kept].cpu(),
    }


def written(
    folder: Path, parts: Iterable[dict[str, Tensor]], shard_rows: int, dtype: torch.dtype
) -> Iterator[dict]:
    """Write packed codes in shards of at least so many rows, but the last; each as the manifest has it."""
    waiting: list[dict[str, Tensor]] = []
    number = 0

    def write() -> dict:
        tensors = {name: torch.cat([part[name] for part in waiting]) for name in waiting[0]}
        tensors["values"] = tensors["values"].to(dtype)
        file = f"codes-{number:05d}.safetensors"
        save(tensors, folder / file)
        return {"file": file, "rows": len(tensors["counts"]), "entries": len(tensors["values"])}

    for part in parts:
        waiting.append(part)
        if sum(len(one["counts"]) for one in waiting) >= shard_rows:
            yield write()
            waiting, number = [], number + 1
    if waiting:
        yield write()


def read_codes(folder: str | Path) -> Iterator[SparseCode]:
    """The codes in a folder that `encode_source` wrote, one for each of its shards, on the CPU.

    Raises FileNotFoundError where there are none, ValueError for a folder of another format.
    """
    folder = Path(folder)
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder of codes: no {MANIFEST}")
    manifest = json.loads(file.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{str(file)!r} is of format {manifest.get('format')!r}, not {FORMAT!r}")
    for shard in manifest["shards"]:
        yield unpacked(load_file(folder / shard["file"]), manifest["n"])


def unpacked(tensors: dict[str, Tensor], n: int) -> SparseCode:
    counts, rows = tensors["counts"], len(tensors["counts"])
    places = max(1, int(counts.max()))
    used = torch.arange(places) < counts.unsqueeze(1)
    values, indices = torch.zeros(rows, places), torch.full((rows, places), n, dtype=torch.int32)
    values[used], indices[used] = tensors["values"].float(), tensors["indices"]
    kernels = dispatch.sparse_kernels(None, values.device)
    return SparseCode(values, indices, counts, (rows, n), Transposition(kernels, n))


def encode(options: EncodeOptions) -> None:
    """softsae encode: the codes of activations as a folder of shards."""
    from softsae.commands import load_run
    from softsae.trainer import pick_device

    sae = load_run(Path(options.run), pick_device(options.device))
    out = encode_source(
        sae,
        as_source(options.activations),
        options.out,
        k=options.k,
        batch_size=options.batch_size,
        shard_rows=options.shard_rows,
        dtype=options.dtype,
    )
    manifest = json.loads((out / MANIFEST).read_text())
    entries = sum(shard["entries"] for shard in manifest["shards"])
    print(f"{manifest['rows']} codes with {entries / max(manifest['rows'], 1):.1f} latents each, see {out}")
