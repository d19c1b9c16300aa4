"""What every result file says of the machine and the code that made it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import softtopk

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, str | int]:
    """Processor, GPU, versions and commit; SOFTTOPK_COMMIT names the commit where there is no git."""
    env: dict[str, str | int] = {
        "softtopk": softtopk.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        env["gpu"] = torch.cuda.get_device_name()
        env["cuda"] = torch.version.cuda
    try:
        import triton

        env["triton"] = triton.__version__
    except ImportError:
        pass
    return env


def commit() -> str:
    if named := os.environ.get("SOFTTOPK_COMMIT"):
        return named
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return "unknown"
    code = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]  # a run may have written others
    changed = subprocess.run(code, capture_output=True, text=True).stdout
    return found.stdout.strip() + ("+changes" if changed.strip() else "")


def processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_label(device: str) -> str:
    """h200, cpu, ...: the part of a result file's name that says where it was made."""
    if device == "cpu":
        return "cpu"
    return torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "-").lower()


def write(path: Path, rows: list[dict], **extra) -> None:
    """A result file: {"environment": ..., "rows": [...]}, one row a line so that diffs can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"environment": environment(), **extra}, indent=1)[:-2]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    json.loads(temporary.read_text())
    temporary.replace(path)
    print(f"wrote {path}")
