"""Random calls of the public functions, each a function of its seed, checked against the float64 oracle.

A case is a batch with everything drawn at once: dtype, shape, strides, distribution, infinities and
NaN, k and alpha as numbers or tensors, largest, and which function. One row counts as one case.
tests/softtopk/test_fuzz.py runs them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, inf, nan

from softtopk import hard_topk, log_soft_topk, soft_topk
from softtopk.backends import reference
from tests.accuracy import Oracle, Result, oracle, ratios, units_in_last_place
from tests.cases import FAMILIES, make

HALVES = (torch.float16, torch.bfloat16)
# How a (rows, n) batch is laid out for the call: (view, dim), the values being the same.
LAYOUTS = {
    "contiguous": lambda x: (x.clone(), -1),
    "transposed": lambda x: (x.t().contiguous(), 0),
    "misaligned": lambda x: (torch.nn.functional.pad(x, (1, 2))[:, 1:-2], 1),
    "every second": lambda x: (x.repeat_interleave(2, 1)[:, ::2], -1),
    "middle": lambda x: (x.unsqueeze(0).transpose(1, 2).contiguous(), 1),
    "rows apart": lambda x: (x.repeat_interleave(3, 0)[::3], -1),
}


# Triton compiles a kernel for every class of lengths, dtype and kind of argument: on a GPU it gets these.
FEW_LENGTHS = ((5, 6), (600, 1000))
FEW_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Case:
    seed: int
    slow: bool = False  # for an interpreter: few and short rows
    few_kernels: bool = False  # for a compiler that is slow
    form: str = field(init=False)
    x: Tensor = field(init=False)  # (rows, n)
    k: float | Tensor = field(init=False)  # (rows,) float64 where a tensor
    alpha: float | Tensor = field(init=False)
    v: Tensor = field(init=False)
    largest: bool = field(init=False)
    layout: str = field(init=False)

    def __post_init__(self):
        r = random.Random(self.seed)
        n = round(math.exp(r.uniform(0, math.log(200 if self.slow else 4000))))
        if not self.slow and r.random() < 0.02:
            n = r.randint(4000, 70_000)
        rows = r.randint(1, 3) if self.slow else max(1, min(32, 16_000 // n))
        dtype = r.choice((torch.float32,) * 3 + (torch.float64, *HALVES))
        if self.few_kernels:
            n, dtype = 2 * (r.randint(*r.choice(FEW_LENGTHS)) // 2) + 1, r.choice(FEW_DTYPES)
            rows = 32
        self.form = r.choice(("p", "p", "log", "log_complement", "hard"))
        self.largest, self.layout = r.random() < 0.7, r.choice(tuple(LAYOUTS))
        x = make(r.choice(tuple(FAMILIES)), rows, n, self.seed)
        for value, share in ((-inf, 0.2), (inf, 0.1)):
            if r.random() < share:
                x[torch.rand(x.shape, generator=self.generator(1)) < r.choice((0.01, 0.5))] = value
        if r.random() < 0.05:
            x[r.randrange(rows), r.randrange(n)] = nan
        self.x = x.to(dtype)
        self.v = torch.randn(x.shape, generator=self.generator(2)).to(dtype)
        budgets = [self.budget(r, n) for _ in range(rows)]
        scales = [10 ** r.uniform(-5, 1) for _ in range(rows)]
        one_k, one_alpha = (r.random() < 0.3 and not self.few_kernels for _ in range(2))
        self.k = budgets[0] if one_k else torch.tensor(budgets, dtype=torch.float64)
        self.alpha = scales[0] if one_alpha else torch.tensor(scales, dtype=torch.float32)

    def generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(4 * self.seed + stream)

    @staticmethod
    def budget(r: random.Random, n: int) -> float:
        kind = r.random()
        if kind < 0.35:
            return float(r.randint(0, n))
        if kind < 0.45:
            return min(n, r.randint(0, n) + 10 ** r.uniform(-9, -1))
        if kind < 0.6:
            return r.uniform(0, min(n, 3))
        if kind < 0.7:
            return n - r.uniform(0, min(n, 1))
        return r.uniform(0, n)

    def check(self, backend: str, device: str) -> int:
        """The number of rows, or an AssertionError that says what was wrong and how to see it again."""
        try:
            (self.check_hard if self.form == "hard" else self.check_soft)(backend, device)
        except AssertionError as error:
            raise AssertionError(
                f"{self} on {backend}: {error}; again: pytest tests/softtopk/test_fuzz.py -k {backend}"
                f" --fuzz 1 --fuzz-seed {self.seed}"
            ) from None
        return self.x.shape[0]

    def __str__(self) -> str:
        return f"{self.form} of {tuple(self.x.shape)} {self.x.dtype}, {self.layout}, largest={self.largest}"

    def arguments(self, device: str):
        """x as it is laid out, k, alpha and the dim; tensors in x's order of dimensions."""
        x, dim = LAYOUTS[self.layout](self.x)
        shape = x.movedim(dim, -1).shape[:-1]
        k, alpha = (t.reshape(shape).to(device) if isinstance(t, Tensor) else t for t in (self.k, self.alpha))
        return x.to(device) if x.is_contiguous() else self.on(x, device), k, alpha, dim

    @staticmethod
    def on(x: Tensor, device: str) -> Tensor:
        """x with its strides and offset on a device; Tensor.to would pack it."""
        if device == "cpu":
            return x
        whole = x.untyped_storage()
        flat = torch.empty(0, dtype=x.dtype).set_(whole).to(device)
        return flat.as_strided(x.shape, x.stride(), x.storage_offset())

    def check_hard(self, backend: str, device: str) -> None:
        x, k, _, dim = self.arguments(device)
        mask = hard_topk(x, k, dim=dim, largest=self.largest, backend=backend)
        want = reference.hard_topk_mask(self.x, self.k, self.largest)
        got = mask.movedim(dim, -1).reshape(self.x.shape).cpu()
        assert ((got == want) | (got.isnan() & want.isnan())).all(), "the mask differs"

    def check_soft(self, backend: str, device: str) -> None:
        x, k, alpha, dim = self.arguments(device)
        leaves = [x.detach().requires_grad_()]
        leaves += [t.requires_grad_() for t in (k, alpha) if isinstance(t, Tensor)]
        options = {"dim": dim, "largest": self.largest, "backend": backend}
        if self.form == "p":
            y = soft_topk(leaves[0], k, alpha, **options)
        else:
            y = log_soft_topk(leaves[0], k, alpha, complement=self.form == "log_complement", **options)
        v, _ = LAYOUTS[self.layout](self.v)
        gradients = list(torch.autograd.grad(y, leaves, v.to(device)))
        y, grad_x = (t.detach().movedim(dim, -1).reshape(self.x.shape).cpu() for t in (y, gradients.pop(0)))
        want = oracle(self.x, self.k, self.alpha, self.v, self.largest, self.form)
        grad_k = gradients.pop(0).reshape(-1).cpu() if isinstance(k, Tensor) else want.grad_k
        grad_alpha = gradients.pop(0).reshape(-1).cpu() if isinstance(alpha, Tensor) else want.grad_alpha
        got = Result(y, want.solution, *(g.double() for g in (grad_x, grad_k, grad_alpha)))

        bad = self.x.isnan().any(1)
        assert y[bad].isnan().all() and grad_x[bad].isnan().all(), "a bad row is not NaN"
        if not bad.all():
            self.compare(part(got, ~bad), part(want, ~bad), ~bad)

    def compare(self, got: Result, want: Oracle, rows: Tensor) -> None:
        x = self.x[rows].double() * (1 if self.largest else -1)
        alpha, k = (t[rows] if isinstance(t, Tensor) else t for t in (self.alpha, self.k))
        plus, minus = (x == inf).sum(1), (x == -inf).sum(1)
        k = torch.as_tensor(k, dtype=torch.float64).expand(len(x))
        k = torch.minimum(torch.maximum(k, plus.double()), (x.shape[1] - minus).double())
        scale = torch.as_tensor(alpha, dtype=torch.float64).expand(len(x))
        if self.x.dtype in HALVES:
            steps = units_in_last_place(got.p, want.p)
            assert steps.max() <= 1, f"y is {steps.max()} units in the last place off"
        if self.x.dtype == torch.float64:
            largest = torch.where(x.isfinite(), x.abs(), 0).amax(1)
            bar = 1e-12 + 4 * torch.finfo(torch.float64).eps * largest / scale
            if self.form == "p":
                assert ((got.p - want.p).abs().amax(1) <= bar).all(), "p is off in float64"
        got.p, got.grad_x = got.p.double(), got.grad_x.double()
        worst = ratios(got, want, k, alpha, self.v[rows], self.form)
        if self.x.dtype in HALVES:
            worst = {name: worst[name] for name in ("grad_k", "grad_alpha")}
        over = {name: ratio for name, ratio in worst.items() if not ratio <= 1}
        if "grad_x" in over and self.form != "p" and self.cancels(got.grad_x, want.grad_x, rows):
            del over["grad_x"]
        assert not over, f"times the bar: {over}"

    def cancels(self, got: Tensor, want: Tensor, rows: Tensor) -> bool:
        """Whether the error is within the bar of the same v with other signs: then it is v that cancels."""
        k, alpha = (t[rows] if isinstance(t, Tensor) else t for t in (self.k, self.alpha))
        scale = torch.as_tensor(alpha, dtype=torch.float64).expand(len(want))
        size = torch.maximum(want.abs().amax(1), 1e-30 * self.v[rows].double().abs().amax(1) / scale)
        for stream in range(3, 7):
            signs = torch.rand(want.shape, generator=self.generator(stream)).sub(0.5).sign()
            v = self.v[rows].double() * signs
            other = oracle(self.x[rows], k, alpha, v, self.largest, self.form)
            size = torch.maximum(size, other.grad_x.abs().amax(1))
        return bool(((got - want).abs().amax(1) <= 1e-5 * size).all())


def part(result: Result, rows: Tensor) -> Result:
    return type(result)(**{name: t[rows] for name, t in vars(result).items()})
