"""What all tables of the result files have in common."""

from __future__ import annotations

import json

from benchmarks.environment import RESULTS


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
    return "\n".join(lines)


def caption(environment: dict) -> str:
    parts = [environment.get("gpu") or environment["processor"], f"torch {environment['torch']}"]
    if "triton" in environment:
        parts.append(f"Triton {environment['triton']}")
    if "gpu" not in environment and "threads" in environment:
        parts.append(f"{environment['threads']} threads")
    if "remark" in environment:
        parts.append(environment["remark"])
    return ", ".join(parts) + f", commit {environment['commit']}"
