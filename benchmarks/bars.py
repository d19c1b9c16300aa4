"""The speed bars as data: which cells the table of soft_topk has, and what each of them has to reach.

A cell is one (section, op, pass, backend, dtype, rows, n, k, alpha, distribution); a row of a result file
holds what was measured of one, under the same names. A cell without a row is unmet. The floor of a
forward is a copy of x, of a backward one and a half, of hard_topk, which writes little, half a copy: the
reading. A fraction is the floor over the time, both of one run.
"""

from __future__ import annotations

from dataclasses import dataclass

LENGTHS = (4096, 16384, 32768, 65536, 131072)
ODD_LENGTHS = {4095: 4096, 5000: 4096, 24576: 32768, 50257: 65536}  # and the nearest length of LENGTHS
CPU_SHAPES = ((256, 4096), (64, 16384), (16, 65536))
SMALL_ROWS = (1, 2, 8, 64)
ALPHAS = (1.0, 1e-2, 1e-4)
DTYPES = ("float32", "bfloat16")
DIVISORS = (64, 8, 2)  # k = n / 64, ...
ADVERSARIAL = (
    *("constant", "two_values", "ascending", "descending", "outlier", "narrow", "heavy_tailed", "negative"),
)
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
LARGE = 1 << 30  # bytes of x: less is dominated by filling and draining the chip
TOPK = "torch.topk(64)"
PEER_ALPHA = 1e-2  # at which peers of soft_topk are timed on a GPU; on a CPU at every alpha

HEADLINE = {  # (pass, dtype) -> fraction at each of LENGTHS, at every alpha
    ("forward", "float32"): (0.90, 0.90, 0.85, 0.75, 0.75),
    ("forward", "bfloat16"): (0.75, 0.80, 0.80, 0.70, 0.70),
    ("backward", "float32"): (0.93, 0.93, 0.90, 0.85, 0.80),
    ("backward", "bfloat16"): (0.90, 0.90, 0.85, 0.80, 0.80),
}
# What max_error of a row may be; above it the result is wrong, whatever the time. It is max|p - oracle|, or
# max|grad_x - oracle| over its row's largest; a half dtype adds half a unit in the last place. hard_topk
# may have no wrong value or index at all.
ERRORS = {
    ("forward", "float32"): 1e-6,
    ("forward", "bfloat16"): 1e-6 + 2**-9,
    ("forward", "float16"): 1e-6 + 2**-12,
    ("backward", "float32"): 1e-5,
    ("backward", "bfloat16"): 1e-5 + 2**-8,
    ("backward", "float16"): 1e-5 + 2**-11,
}


@dataclass(frozen=True)
class Cell:
    section: str
    op: str
    run: str  # "pass" in a row: a word that Python keeps for itself
    backend: str
    dtype: str
    rows: int
    n: int
    k: str  # "20..120", "n/8", "64": the budgets of the rows
    alpha: float | None
    distribution: str = "relu"
    # What it has to reach; all that is set, and a correct result besides.
    fraction: float | None = None
    most_ms: float | None = None
    speedups: tuple[tuple[str, float], ...] = ()  # so many times faster than a peer; "*" stands for any
    required: tuple[str, ...] = ()  # peers without whose time there is no verdict
    neighbour: int | None = None  # the length whose headline fraction it may miss by 15%
    large: bool = False  # on LARGE bytes of x or more
    bar: bool = True  # False: measured for the record

    def keys(self) -> dict:
        names = (
            *("section", "op", "run", "backend", "dtype", "rows"),
            *("n", "k", "alpha", "distribution"),
        )
        return {"pass" if name == "run" else name: getattr(self, name) for name in names}


def key(row: dict) -> tuple:
    """What tells the rows of a result file apart. The number of rows does so only where it varies."""
    names = ("section", "op", "pass", "backend", "dtype", "n", "k", "alpha", "distribution")
    varies = row["section"] in ("small", "sweep_rows")
    return (*(row[name] for name in names), row["rows"] if varies else None)


def large_rows(n: int, dtype: str) -> int:
    return -(-LARGE // (n * ITEMSIZE[dtype]))


def soft(section: str, backend: str, n: int, dtype: str, alpha: float, run: str, **bar) -> Cell:
    return Cell(
        section,
        *("soft_topk", run, backend, dtype, large_rows(n, dtype), n, bar.pop("k", "20..120"), alpha),
        **bar,
        large=True,
    )


def gpu_cells() -> list[Cell]:
    """Every cell that a GPU has to have."""
    cells = []
    each = [(dtype, alpha, run) for dtype in DTYPES for alpha in ALPHAS for run in ("forward", "backward")]
    for n in LENGTHS:
        for dtype, alpha, run in each:
            at = (n, dtype, alpha, run)
            fraction = HEADLINE[run, dtype][LENGTHS.index(n)]
            cells.append(soft("headline", "cuda", *at, fraction=fraction))
            cells += [soft("large_k", "cuda", *at, fraction=0.6, k=f"n/{d}") for d in DIVISORS]
            cells += [soft("adversarial", "cuda", *at, fraction=0.4, distribution=f) for f in ADVERSARIAL]
        for dtype in DTYPES:
            fraction = 0.5 if (n, dtype) == (4096, "bfloat16") else 0.7
            cells.append(
                Cell(
                    *("hard", "hard_topk", "forward", "cuda", dtype, large_rows(n, dtype), n, "64", None),
                    fraction=fraction,
                    speedups=(("*", 1.0),),
                    required=(TOPK,),
                    large=True,
                )
            )
            cells += [small(rows, n, dtype, run) for rows in SMALL_ROWS for run in ("forward", "graph")]
    for n, neighbour in ODD_LENGTHS.items():
        cells += [soft("odd", "cuda", n, *at, neighbour=neighbour) for at in each]
    for n in (*LENGTHS, 262144):
        for dtype, alpha, run in each:
            fraction = None if n > 32768 else 0.6 if dtype == "float32" else 0.4
            cells.append(soft("triton", "triton", n, dtype, alpha, run, fraction=fraction))
    overhead = ("overhead", "host overhead")
    cells.append(Cell(*overhead, "forward", "cuda", "float32", 1, 4096, "64", 1e-2, most_ms=0.010))
    cells.append(Cell(*overhead, "forward, gradients", "cuda", "float32", 1, 4096, "64", 1e-2, bar=False))
    return cells


def small(rows: int, n: int, dtype: str, run: str) -> Cell:
    """Calls one after the other ("forward") and replayed from a CUDA graph, without the host ("graph")."""
    return Cell(
        *("small", "soft_topk", run, "cuda", dtype, rows, n, "64", 1e-2),
        speedups=((TOPK, 1.0),),
        required=(TOPK,),
    )


def cpu_cells() -> list[Cell]:
    """Every cell that a CPU has to have."""
    cells = []
    for rows, n in CPU_SHAPES:
        for dtype in DTYPES:
            for alpha in ALPHAS:
                at = ("cpu", dtype, rows, n, "20..120", alpha)
                faster = (("reference", 5.0), ("LapSum PyTorch", 5.0), ("LapSum C++", 3.0))
                cells += [
                    Cell("cpu", "soft_topk", "forward", *at, speedups=((TOPK, 1.0),), required=(TOPK,)),
                    Cell("cpu", "soft_topk", "backward", *at, bar=False),
                    Cell(
                        *("cpu", "soft_topk", "forward+backward", *at),
                        speedups=faster,
                        required=("reference",),
                    ),
                ]
            at = ("cpu", dtype, rows, n, "64", None)
            cells.append(Cell("cpu", "hard_topk", "forward", *at, speedups=((TOPK, 1.0),), required=(TOPK,)))
    return cells


def cells(device: str) -> list[Cell]:
    return cpu_cells() if device == "cpu" else gpu_cells()


Verdict = tuple[Cell, dict | None, str | None]


def allowed_error(cell: Cell) -> float:
    if cell.op == "hard_topk":
        return 0.0
    run = "backward" if "backward" in cell.run else "forward"
    return ERRORS[run, cell.dtype]


def unmet(cell: Cell, row: dict | None, measured: dict[tuple, dict]) -> str | None:
    """None where the row reaches the cell's bar, otherwise in a few words what it misses.

    `measured` holds all rows of the file by key: an odd length is held against its neighbour.
    """
    if row is None:
        return "not measured"
    if row.get("error"):
        return row["error"]
    if row["max_error"] is not None and not row["max_error"] <= allowed_error(cell):
        return f"error {row['max_error']:.1e} > {allowed_error(cell):.1e}"
    if cell.large and row["rows"] * row["n"] * ITEMSIZE[cell.dtype] < LARGE:
        return f"measured on {row['rows'] * row['n'] * ITEMSIZE[cell.dtype] >> 20} MiB, not 1 GiB"
    least = cell.fraction
    if cell.neighbour is not None:
        beside = measured.get(key({**cell.keys(), "section": "headline", "n": cell.neighbour}))
        if beside is None or beside.get("error"):
            return f"n = {cell.neighbour} is not measured"
        least = beside["fraction"] / 1.15
    if least is not None and not row["fraction"] >= least:
        return f"{row['fraction']:.1%} < {least:.1%}"
    if cell.most_ms is not None and not row["ms"] <= cell.most_ms:
        return f"{row['ms']:.4f} ms > {cell.most_ms} ms"
    if missing := [peer for peer in cell.required if peer not in row["peers"]]:
        return f"{missing[0]} is not measured"
    for name, factor in cell.speedups:
        for peer, ms in row["peers"].items():
            if name in ("*", peer) and not row["ms"] * factor <= ms:
                return f"{ms / row['ms']:.2f} times as fast as {peer}, not {factor:g}"
    return None


def verdicts(device: str, rows: list[dict], record: bool = False) -> list[Verdict]:
    """Every cell that has a bar, with its row and what it misses; with `record` also what was measured
    without one, which can miss nothing but being right."""
    measured = {key(row): row for row in rows}
    found = []
    for cell in cells(device):
        row = measured.get(key(cell.keys()))
        if cell.bar or (record and row):
            found.append((cell, row, unmet(cell, row, measured)))
    return found
