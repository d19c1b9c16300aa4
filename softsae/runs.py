"""Run folders: where a run's configuration, metrics, checkpoints, plots and summary are kept."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml

OPTIONS = "config.yaml"  # what the command was given, for --resume and for the reader


def open_run(out: Path, command: str, options: Any, resume: bool) -> None:
    """Make the run folder and write its options to config.yaml; a resumed run keeps its own.

    The file can be given to --config.

    Raises:
        FileExistsError: the folder is not empty and resume is False.
    """
    check_free(out, resume)
    if resume:
        return
    out.mkdir(parents=True, exist_ok=True)
    saved = {name: value for name, value in plain(options).items() if name != "resume"}
    write_text(out / OPTIONS, header(command) + yaml.safe_dump(saved, sort_keys=False))


def check_free(out: Path, resume: bool) -> None:
    """Raises FileExistsError when `out` cannot be a new run folder and is not to be resumed."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {str(out)!r} exists and is not a folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        hint = "go on with --resume, or " if (out / OPTIONS).is_file() else ""
        raise FileExistsError(f"--out {str(out)!r} is not empty: {hint}choose another folder")


def saved_options(out: Path, command: str) -> Path:
    """config.yaml of the run in `out`, to resume it.

    Raises FileNotFoundError when there is no run, ValueError for a run of another command.
    """
    file = out / OPTIONS
    if not file.is_file():
        raise FileNotFoundError(f"--resume: no run in {str(out)!r} ({OPTIONS} is missing)")
    if not file.read_text().startswith(header(command)):
        raise ValueError(f"--resume: {str(file)!r} is not from softsae {command}")
    return file


def header(command: str) -> str:
    return f"# softsae {command}\n"


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as what YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise ValueError(f"{str(file)!r}, line {number + 1} is not JSON") from None
    return records


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(plain(value), indent=1) + "\n")


def read_json(file: Path) -> Any:
    """What `write_json` wrote; raises ValueError, which names the file, for one that is damaged."""
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def write_text(file: Path, text: str) -> None:
    """Written under a temporary name, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
