"""The bars of the sparse path and of a whole training step as data.

A cell is one (section, op, pass, backend, dtype, rows, n, d, k, latents) of benchmarks/sparse.py; a row of
its result file holds what was measured of one, under the same names. Each cell has conditions, and every
condition is a bar; a cell without a row misses all of them. The bars of a training step (benchmarks/step.py)
are claims about several rows of one shape. Both end up as a list of verdicts in the result file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

# (rows, n) of pre-activations: what the selection reads.
SELECTION_SHAPES = ((4096, 16384), (4096, 24576), (4096, 65536), (8192, 131072))
SELECTION_FRACTION = {16384: 0.70}  # only 32 us in bfloat16; at other lengths OTHER_FRACTION
OTHER_FRACTION = 0.80
BACKWARD_SHARE = 0.5  # of the selection's forward
LENGTHS = tuple(2**i for i in range(10, 19))  # of the cost against n
LENGTHS_ELEMENTS = 2**28
# (rows, k, d, n) of codes and the weights that they select rows of.
CODE_SHAPES = (
    *((4096, 64, 768, 24576), (4096, 64, 2304, 16384)),
    *((4096, 64, 2304, 65536), (8192, 32, 4096, 131072)),
)
ZIPF_SHAPES = ((4096, 64, 768, 24576), (4096, 64, 2304, 65536))
DTYPES = ("bfloat16", "float32")
SPARSIFY, EMBEDDING_BAG, OPENAI = "sparsify", "F.embedding_bag", "OpenAI"
RELU_TOPK, DENSE_TOPK = "relu + torch.topk(64)", "dense soft_topk"
FUSED_ADAM, AUTOGRAD = "torch.optim.Adam(fused=True)", "autograd"
# (rows, d, n, k) of training steps.
STEP_SHAPES = (
    *((8192, 512, 4096, 220), (2048, 2304, 16384, 80)),
    *((4096, 768, 24576, 64), (2048, 2304, 65536, 80)),
)
SOFTSAE_REFERENCE, TOPK_REFERENCE = "SoftSAE, its authors", "TopK, dictionary_learning"
WIDE, BOTTLENECK, TOPK = "SoftSAE, wide estimator", "SoftSAE, bottleneck estimator", "TopK"
ADAM_BYTES = 28  # a parameter: gradient, parameter and two moments read, the last three written

# The largest error of what is timed, above which it is wrong whatever its time: of values over the largest
# activation of their row, of others over the largest of their row or latent.
ERRORS = {"selection forward": 2e-6, "selection backward": 2e-5, "bfloat16": 2**-7, "float32": 2e-5}

Found = str  # what was found, in a few words


class Condition(NamedTuple):
    """Something that a row has to fulfil: in words, and (row, rows by key) -> (met, what was found)."""

    asked: str
    test: Callable[[dict, dict[tuple, dict]], tuple[bool, Found]]


@dataclass(frozen=True)
class Cell:
    section: str
    op: str
    run: str  # "pass" in a row
    dtype: str
    rows: int
    n: int
    d: int | None
    k: str  # the budgets: "64", "32..96"
    latents: str = ""  # how the latents of a code are drawn: "uniform", "zipf"
    backend: str = "cuda"
    conditions: tuple[Condition, ...] = field(default=(), compare=False)

    def keys(self) -> dict:
        return {"pass" if name == "run" else name: getattr(self, name) for name in CELL_NAMES}


CELL_NAMES = ("section", "op", "run", "backend", "dtype", "rows", "n", "d", "k", "latents")


class Verdict(NamedTuple):
    """One bar: of what, what it asks, what was found, whether it is met."""

    of: str
    asked: str
    found: Found
    met: bool


def key(row: dict) -> tuple:
    """What tells the rows of benchmarks/sparse.py apart."""
    return tuple(row["pass" if name == "run" else name] for name in CELL_NAMES)


def at_least(fraction: float) -> Condition:
    """Of the floor."""
    found = f"≥ {fraction:.0%} of the floor"
    return Condition(found, lambda row, _: (row["fraction"] >= fraction, f"{row['fraction']:.1%}"))


def faster_than(peer: str, factor: float) -> Condition:
    def test(row: dict, _) -> tuple[bool, Found]:
        if peer not in row["peers"]:
            return False, f"{peer} is not measured"
        ratio = row["peers"][peer] / row["ms"]
        return ratio >= factor, f"{ratio:.2f}×"

    return Condition(f"≥ {factor:g}× as fast as {peer}", test)


def share_of(other: Cell, share: float) -> Condition:
    """Of the time of another cell."""

    def test(row: dict, measured: dict[tuple, dict]) -> tuple[bool, Found]:
        beside = measured.get(key(other.keys()))
        if beside is None or beside["ms"] is None:
            return False, f"the {other.run} is not measured"
        found = row["ms"] / beside["ms"]
        return found <= share, f"{found:.2f}"

    return Condition(f"≤ {share:g} × the {other.run}", test)


def bit_equal() -> Condition:
    return Condition("bit-equal from run to run", lambda row, _: (row["bit_equal"], str(row["bit_equal"])))


def room(k: float) -> int:
    """The places that a code of budgets up to k has by default."""
    return 32 * math.ceil(1.25 * k / 32) + 32


def selection_cells(backend: str) -> list[Cell]:
    cells = []
    for rows, n in SELECTION_SHAPES:
        for dtype in DTYPES:
            at = (dtype, rows, n, None)
            barred = backend == "cuda" and dtype == "bfloat16"
            fraction = SELECTION_FRACTION.get(n, OTHER_FRACTION)
            forward = Cell(
                *("selection", "soft_topk_code", "forward", *at, "32..96"),
                backend=backend,
                conditions=(at_least(fraction),) if barred else (),
            )
            cells += [
                forward,
                Cell(
                    *("selection", "soft_topk_code", "backward", *at, "32..96"),
                    backend=backend,
                    conditions=(share_of(forward, BACKWARD_SHARE),) if barred else (),
                ),
                Cell("selection", "hard_topk_code", "forward", *at, "64", backend=backend),
            ]
    return cells


def length_cells(backend: str) -> list[Cell]:
    """The cost against n, of as many elements for every n."""
    cells = []
    for n in LENGTHS:
        for dtype in DTYPES:
            at = (dtype, LENGTHS_ELEMENTS // n, n, None, "32..96")
            cells += [
                Cell("selection_n", "soft_topk_code", run, *at, backend=backend)
                for run in ("forward", "backward")
            ]
    return cells


def code_cells(backend: str) -> list[Cell]:
    """Decoding, and the backward of it."""
    cells = []
    draws = [(shape, "uniform") for shape in CODE_SHAPES] + [(shape, "zipf") for shape in ZIPF_SHAPES]
    for (rows, k, d, n), latents in draws:
        for dtype in DTYPES:
            at = (dtype, rows, n, d, str(k), latents, backend)
            barred = backend == "cuda" and dtype == "bfloat16"
            factor = 1.3 if latents == "uniform" else 10.0
            cells += [
                Cell(
                    *("decode", "sparse_decode", "forward", *at),
                    conditions=(faster_than(SPARSIFY, 1.1), bit_equal()) if barred else (),
                ),
                Cell(
                    *("backward", "sparse_decode", "backward", *at),
                    conditions=(faster_than(SPARSIFY, factor), bit_equal()) if barred else (),
                ),
            ]
    return cells


def dense_cells(backend: str) -> list[Cell]:
    """Adam on the weights of a step, which has no Triton kernel, and the wide estimator, for the record."""
    cells = []
    for rows, d, n, k in STEP_SHAPES:
        for op in ("Adam", "Adam, rows of a code") if backend != "triton" else ():
            cells.append(Cell("adam", op, "step", "float32", rows, n, d, str(k), "zipf", backend))
        for dtype in DTYPES:
            at = ("relu_projection", "forward+backward", dtype, rows, n, d)
            cells.append(Cell("estimator", *at, "", "", backend))
    return cells


SECTIONS: dict[str, Callable[[str], list[Cell]]] = {
    "selection": selection_cells,
    "selection_n": length_cells,
    "decode": lambda backend: [c for c in code_cells(backend) if c.section == "decode"],
    "backward": lambda backend: [c for c in code_cells(backend) if c.section == "backward"],
    "adam": lambda backend: [c for c in dense_cells(backend) if c.section == "adam"],
    "estimator": lambda backend: [c for c in dense_cells(backend) if c.section == "estimator"],
}


def cells(backend: str = "cuda", sections: Iterable[str] = tuple(SECTIONS)) -> list[Cell]:
    return [cell for section in sections for cell in SECTIONS[section](backend)]


def allowed_error(cell: Cell) -> float:
    if cell.op == "hard_topk_code":
        return 0.0
    if cell.section.startswith("selection"):
        return ERRORS[f"selection {cell.run}"]
    return ERRORS[cell.dtype]


def wrong(cell: Cell, row: dict) -> str | None:
    """Why the time of a row says nothing, None where it is right."""
    if row.get("error"):
        return row["error"]
    if row["max_error"] is not None and not row["max_error"] <= allowed_error(cell):
        return f"error {row['max_error']:.1e} > {allowed_error(cell):.1e}"
    return None


def label(cell: Cell) -> str:
    width = "" if cell.d is None else f"×{cell.d}"
    words = (cell.op, cell.run, cell.dtype, f"{cell.rows}×{cell.n}{width}", f"k={cell.k}", cell.latents)
    return " ".join(word for word in words if word)


def verdicts(rows: list[dict]) -> list[Verdict]:
    """Every bar of the sparse path on a GPU."""
    measured = {key(row): row for row in rows}
    found = []
    for cell in cells():
        row = measured.get(key(cell.keys()))
        reason = "not measured" if row is None else wrong(cell, row)
        for asked, test in cell.conditions:
            met, what = (False, reason) if reason else test(row, measured)
            found.append(Verdict(label(cell), asked, what, bool(met)))
    return found


def step_floor_ms(
    rows: int, d: int, n: int, k: float, hidden: int, bytes_per_s: float, flops: float = 700e12
) -> dict[str, float]:
    """The estimated floor of a training step with an estimator of `hidden` units (0: none), in ms by part.

    Products in bfloat16, parameters, gradients and Adam in float32. The encoder's product and the two of the
    estimator are dense; what follows is sparse (three gathers: decoding, dW_dec with the gradients of the
    values, dW_enc; the code read and written; its entries sorted, two passes over key and value) or four more
    dense products, whichever is less. Six passes over pre-activations and what is made of them, (rows, n)
    in bfloat16.
    """
    product = 2.0 * rows * d * n / flops * 1e3
    per_byte = 1e3 / bytes_per_s
    parameters = 2.0 * n * d + hidden * d
    entries = float(rows) * k
    sparse = {
        "gathers": 3 * entries * d * 2 * per_byte,
        "code": entries * 12 * 4 * per_byte,
        "sort": entries * 8 * 2 * 2 * per_byte,
    }
    dense = {"dense products after the selection": 4 * product}
    return {
        "products": product + 2 * 2.0 * rows * d * hidden / flops * 1e3,
        "Adam": ADAM_BYTES * parameters * per_byte,
        "gradients": 4 * parameters * per_byte,
        "passes over (B, n)": 6 * float(rows) * n * 2 * per_byte,
        **min(sparse, dense, key=lambda parts: sum(parts.values())),
    }


def fastest(rows: list[dict], shape: tuple, trainer: str, precision: str | None = None) -> dict | None:
    """The row of a trainer at a shape that took the least time."""
    fitting = [
        row
        for row in rows
        if (row["rows"], row["d"], row["n"], row["k"]) == tuple(shape)
        and row["trainer"] == trainer
        and precision in (None, row["precision"])
        and row["ms"] is not None
    ]
    return min(fitting, key=lambda row: row["ms"], default=None)


def ratio(above: dict | None, below: dict | None, name: str, of: str, field: str = "ms") -> float | str:
    """above[field] / below[field], or which of the two, by its name, is not measured."""
    for row, called in ((below, of), (above, name)):
        if row is None or row.get(field) is None:
            return f"{called} is not measured"
    return above[field] / max(below[field], 1e-12)


def step_verdicts(rows: list[dict]) -> list[Verdict]:
    """Every bar of the whole training step on a GPU."""
    return [verdict for shape in STEP_SHAPES for verdict in shape_verdicts(rows, shape)]


def shape_verdicts(rows: list[dict], shape: tuple) -> list[Verdict]:
    wide, bottleneck, topk = (fastest(rows, shape, name, "bfloat16") for name in (WIDE, BOTTLENECK, TOPK))
    softsae, hard = (fastest(rows, shape, name, "TF32") for name in (SOFTSAE_REFERENCE, TOPK_REFERENCE))
    where = "B={}, d={}, n={}, k={}".format(*shape)
    second = shape == STEP_SHAPES[1]

    def verdict(trainer: str, asked: str, value: float | str, least: float, most: float) -> Verdict:
        found = value if isinstance(value, str) else f"{value:.2f}"
        met = not isinstance(value, str) and least <= value <= most
        return Verdict(f"{trainer}; {where}", asked, found, met)

    def faster(trainer: str, ours: dict | None, other: dict | None, name: str, factor: float) -> Verdict:
        asked = f"≥ {factor:g}× as fast as {name} (TF32)"
        return verdict(trainer, asked, ratio(other, ours, name, trainer), factor, math.inf)

    memory = ratio(wide, softsae, WIDE, SOFTSAE_REFERENCE, "beyond_bytes")
    asked = f"≤ 0.2 × the memory of {SOFTSAE_REFERENCE} beyond parameters, gradients and optimizer state"
    return [
        faster(WIDE, wide, softsae, SOFTSAE_REFERENCE, 40 if second else 50),
        *([faster(BOTTLENECK, bottleneck, softsae, SOFTSAE_REFERENCE, 50)] if second else []),
        faster(WIDE, wide, hard, TOPK_REFERENCE, 2),
        verdict(WIDE, asked, memory, 0, 0.2),
        verdict(BOTTLENECK, f"≤ 1.1 × our {TOPK} step", ratio(bottleneck, topk, BOTTLENECK, TOPK), 0, 1.1),
    ]
