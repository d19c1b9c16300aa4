"""The comparison with other implementations: its probes tell good from bad, its adapters fit.

No peer is needed, except for LapSum's own tests, which run where SOFTTOPK_PEER_LAPSUM names its checkout.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import softtopk
from benchmarks import lapsum_suite, report
from benchmarks.environment import ROOT
from benchmarks.features import in_a_process, outcome
from benchmarks.implementations import Absent, Implementation, column, load, ours
from benchmarks.peers import cell, compute
from benchmarks.probes import FEATURES
from tests.accuracy import oracle
from tests.cases import make


def spread(alpha, x, dim):
    return alpha.unsqueeze(dim) if isinstance(alpha, torch.Tensor) and alpha.dim() else alpha


def share(x, k, alpha, dim=-1):
    """k softmax(x / alpha): no top-k, but it sums to k and torch does all else that a probe asks for."""
    k = k.unsqueeze(dim) if isinstance(k, torch.Tensor) else k
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (k * torch.softmax(wide / spread(alpha, x, dim), dim)).to(x.dtype)


def implementation(function, **fields) -> Implementation:
    return Implementation("tested", function, "0", "nowhere", **{"operator": "another"} | fields)


# Probes that compare with LapSum's own p; the implementations of the other tests are another operator.
OF_LAPSUM = {
    "gradient to a whole k at alpha = 1e-4",
    "log p to 1e-5 of its value",
    "log(1 - p) to 1e-5 of its value",
}
NOT_HERE = {"custom stream", "CUDA graph"}
GENERAL = [f for f in FEATURES if f not in OF_LAPSUM | NOT_HERE]


@pytest.mark.parametrize("feature", GENERAL)
def test_a_good_function_has_every_feature(feature):
    found = outcome(FEATURES[feature], implementation(share), "cpu")
    assert found.isdigit() if "memory" in feature else found == "yes"


def off(x, k, alpha, dim=-1):
    return 1.1 * share(x, k, alpha, dim)


def detached(x, k, alpha, dim=-1):
    return share(x, k, alpha, dim).detach()


def one_number(x, k, alpha, dim=-1):
    k, alpha = (t.item() if isinstance(t, torch.Tensor) else t for t in (k, alpha))
    return share(x, k, alpha, dim)


def last_dimension(x, k, alpha, dim=-1):
    if x.dim() != 2 or dim != -1:
        raise ValueError("rows only\nand a second line")
    return share(x, k, alpha)


def opaque(x, k, alpha, dim=-1):
    """A gradient that torch cannot differentiate, trace or batch."""

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.from_numpy(share(x, k, alpha, dim).detach().numpy())

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, v):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(share(x, k, alpha, dim), x, v)[0]

    return Opaque.apply(x)


def noisy(x, k, alpha, dim=-1):
    return share(x, k, alpha, dim) + 1e-6 * torch.rand_like(x)


def short(x, k, alpha, dim=-1):
    return share(x, k, alpha, dim) * (torch.arange(len(x)) < 65536).view(-1, *[1] * (x.dim() - 1))


def changes_x(x, k, alpha, dim=-1):
    p = share(x, k, alpha, dim)
    x.data.neg_()
    return p


def reversed_alpha(x, k, alpha, dim=-1):
    return share(x, k, alpha.detach() * 2 - alpha if isinstance(alpha, torch.Tensor) else alpha, dim)


@pytest.mark.parametrize(
    "feature, bad, start",
    [
        ("k per row, with gradient", off, "wrong: sum(p)"),
        ("k per row, with gradient", detached, "none: no gradient"),
        ("k per row, with gradient", one_number, "raises RuntimeError"),
        ("alpha per row, with gradient", one_number, "raises RuntimeError"),
        ("alpha per row, with gradient", reversed_alpha, "wrong: derivative to alpha"),
        ("gradient to a computed alpha", reversed_alpha, "wrong: derivative to log alpha"),
        ("gradient to a computed alpha", one_number, "none: no gradient"),
        ("alpha as a number, backward", detached, "none: no gradient"),
        ("3-D input, backward", last_dimension, "raises ValueError: rows only"),
        ("any dim, backward", last_dimension, "raises ValueError: rows only"),
        ("bfloat16", off, "wrong: sum(p)"),
        ("float16", lambda x, *a: share(x.float(), *a), "wrong: p is torch.float32"),
        ("strided input, backward", lambda x, *a: share(x.view(-1).view_as(x), *a), "raises RuntimeError"),
        ("double backward", opaque, "wrong: derivative to x 0"),
        ("forward mode", opaque, "raises RuntimeError"),
        ("vmap", opaque, "raises RuntimeError"),
        ("torch.compile(fullgraph=True)", lambda *a: (torch._dynamo.graph_break(), share(*a))[1], "raises"),
        ("same bits from run to run", noisy, "wrong: results differ"),
        ("70,000 rows", short, "wrong: the last row"),
        ("arguments left unchanged", changes_x, "wrong: x is changed"),
    ],
)
def test_a_bad_function_is_found_out(feature, bad, start):
    found = outcome(FEATURES[feature], implementation(bad), "cpu")
    assert found.startswith(start), found
    assert "\n" not in found


def test_an_import_that_needs_cuda_is_recorded():
    needs_cuda = implementation(share, import_error=ImportError("no module lapsum in /one/two/three.py"))
    found = outcome(FEATURES["imported without CUDA"], needs_cuda, "cpu")
    assert found == "raises ImportError: no module lapsum in three.py"


def exact_log(x, k, alpha, complement=False):
    """log p from the float64 threshold; for a gradient the logarithm of float64 p, which is finite there."""
    wide = x.double()
    _, b = softtopk.soft_topk(wide.detach(), k.detach(), alpha, return_threshold=True, backend="reference")
    t = (wide.detach() - b.unsqueeze(1)) / alpha * (-1 if complement else 1)
    exact = torch.where(t <= 0, t - torch.tensor(2.0).log(), torch.log1p(-0.5 * torch.exp(-t.abs())))
    if not (x.requires_grad or k.requires_grad):
        return exact
    p = softtopk.soft_topk(wide, k, alpha)
    return (1 - p if complement else p).log()


def naive_log(x, k, alpha, complement=False):
    p = softtopk.soft_topk(x, k, alpha)
    return (1 - p if complement else p).log()


@pytest.mark.parametrize("feature", ["log p to 1e-5 of its value", "log(1 - p) to 1e-5 of its value"])
def test_log_probes(feature):
    good = replace(ours("reference"), log=exact_log)
    assert outcome(FEATURES[feature], good, "cpu") == "yes"
    assert outcome(FEATURES[feature], replace(good, log=naive_log), "cpu").startswith("wrong: ")
    assert outcome(FEATURES[feature], replace(good, log=None), "cpu") == "none: no log p"


def test_gradient_to_a_whole_k():
    feature = FEATURES["gradient to a whole k at alpha = 1e-4"]
    assert outcome(feature, ours("reference"), "cpu") == "yes"

    def lost(x, k, alpha, dim=-1):
        _, b = softtopk.soft_topk(x, k.detach(), alpha, return_threshold=True, backend="reference")
        h = 0.5 * torch.exp(-(x - b.unsqueeze(1)).abs() / alpha)  # from a threshold that is rounded
        q = h / h.sum(1, keepdim=True)
        p = softtopk.soft_topk(x, k.detach(), alpha)
        return p + q.detach() * (k - k.detach()).unsqueeze(1)

    assert outcome(feature, implementation(lost, operator="LapSum"), "cpu").startswith("wrong: in ")


def test_a_process_tries_every_feature():
    found = in_a_process("softtopk reference", "cpu")
    assert list(found) == list(FEATURES)
    assert found["k per row, with gradient"] == "yes"


def test_a_process_that_dies_is_recorded(monkeypatch):
    import benchmarks.features as features

    monkeypatch.setattr(features, "FEATURES", {"one": None, "two": None})
    script = 'import sys; print(\'{"feature": "one", "outcome": "yes"}\'); sys.exit(139)'
    monkeypatch.setattr(
        features.subprocess,
        "run",
        lambda command, _run=subprocess.run, **options: _run([sys.executable, "-c", script], **options),
    )
    assert in_a_process("any", "cpu") == {"one": "yes", "two": "raises: ended with 139"}


class TestTable:
    k = [3.0, 3.5]
    x = make("normal", 2, 31)
    v = torch.randn(2, 31, generator=torch.Generator().manual_seed(1))

    def cell(self, tested: Implementation, alpha: float = 0.125) -> dict:
        want = oracle(self.x, torch.tensor(self.k), alpha, self.v)
        return cell(tested, self.x, self.k, alpha, self.v, want, "cpu")

    def test_errors_of_ours(self):
        found = self.cell(ours("reference"))
        assert (found["rows"], found["not_finite"], found["failed"]) == (2, 0, {})
        for name in ("p", "sum_relative", "grad_x", "grad_k", "grad_alpha"):
            assert 0 <= found[name] < 1e-5, name

    @pytest.mark.parametrize(
        "name, change",
        [
            ("p", lambda p, x, k, a: p + 0.01),
            ("sum", lambda p, x, k, a: p + 0.01),
            ("grad_x", lambda p, x, k, a: p + 0.01 * (x - x.detach())),
            ("grad_k", lambda p, x, k, a: p + 0.01 * (k - k.detach()).unsqueeze(1)),
            ("grad_alpha", lambda p, x, k, a: p + 1.0 * (a - a.detach())),
        ],
    )
    def test_each_error_is_seen(self, name, change):
        def function(x, k, alpha, dim=-1):
            return change(softtopk.soft_topk(x, k, alpha), x, k, alpha)

        assert self.cell(implementation(function, operator="LapSum"))[name] > 1e-3

    def test_another_operator_has_no_error_of_p(self):
        found = self.cell(implementation(share))
        assert found["sum"] < 1e-5
        assert found["p"] is None and found["grad_x"] is None

    def test_rows_that_fail_or_are_not_finite(self):
        def function(x, k, alpha, dim=-1):
            return share(x, k, alpha) * torch.nan

        found = self.cell(implementation(function, whole_k=True))
        assert found["rows"] == found["not_finite"] == 1
        assert found["failed"] == {"ValueError: k must be whole": 1}
        assert found["sum"] is None

    def test_alpha_negated_in_place(self):
        """As LapSum does it: alpha becomes negative and its gradient is that of the negative alpha."""

        class Negate(torch.autograd.Function):
            @staticmethod
            def forward(ctx, alpha):
                alpha.data = -alpha.abs()
                return alpha.abs()

            @staticmethod
            def backward(ctx, v):
                return -v

        def function(x, k, alpha, dim=-1):
            return softtopk.soft_topk(x, k, Negate.apply(alpha))

        assert self.cell(implementation(function, operator="LapSum"))["grad_alpha"] < 1e-5

    def test_compute_gives_what_there_is(self):
        found = compute(implementation(share), self.x[:1], 3.0, 0.5, self.v[:1])
        assert found["p"].shape == (1, 31) and found["grad_x"] is not None
        assert found["grad_k"] is None and found["grad_alpha"] is None


def test_column():
    x = torch.zeros(2, 5, 3)
    assert column(2, x, 1).shape == (2, 1, 3)
    assert column(torch.ones(2, 5), x, -1).shape == (2, 5, 1)


@pytest.mark.parametrize("name, variable", [("LapSum C++", "LAPSUM"), ("DFTopK", "DFTOPK")])
def test_a_peer_that_is_not_here_says_why(monkeypatch, name, variable):
    monkeypatch.delenv(f"SOFTTOPK_PEER_{variable}", raising=False)
    with pytest.raises(ImportError, match=f"SOFTTOPK_PEER_{variable} is not set"):
        load(name, "cpu")


def test_tables_of_a_result_file(tmp_path, monkeypatch):
    cells = {"p": None, "sum": 0.5, "sum_relative": 0.25, "grad_x": None, "grad_k": None, "grad_alpha": None}
    row = {"family": "normal", "n": 4, "alpha": 0.1, "rows": 3, "not_finite": 1, "failed": {}}
    data = {
        "environment": {"processor": "P", "torch": "2", "commit": "c"},
        "peers": {"one": {"version": "1.0"}, "two": {"version": "2.0"}},
        "features": {
            "one": {"vmap": "yes", "log p": "none: no log p", "CUDA graph": "not tried: no GPU"},
            "two": {
                "vmap": "raises TypeError: no",
                "log p": "wrong: by 2",
                "CUDA graph": "not tried: no GPU",
            },
        },
        "rows": [{"name": "one", **row, **cells}, {"name": "two", **row, **cells, "p": 1e-3}],
    }
    (tmp_path / "peers-cpu.json").write_text(json.dumps(data))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    accuracy = report.peers_accuracy().splitlines()
    assert accuracy[2:] == [
        "| one | cpu | 3 | 1 | – | 2.5e-01 | – | – | – |",
        "| two | cpu | 3 | 1 | 1.0e-03 | 2.5e-01 | – | – | – |",
    ]
    features = report.peers_features().splitlines()
    assert features[0] == "| cpu | one | two |"
    assert features[2:4] == ["| vmap | yes | raises TypeError |", "| log p | none | wrong |"]
    assert features[-1] == "P, torch 2, commit c. one 1.0; two 2.0"


class TestLapSumSuite:
    script = (
        "from lapsum.topk import soft_topk\nimport torch\n"
        "p = soft_topk(torch.randn(2, 9), torch.ones(2, 1), torch.tensor(-0.5), dim=1)\n"
        "print('{}' if torch.allclose(p.sum(1), torch.tensor({}).expand(2)) else '{}', '- Sum (atol=1e-5)')\n"
    )

    guarded_raise = "if __name__ == '__main__':\n    raise ValueError\n"

    def run(self, path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "benchmarks.lapsum_suite", str(path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    @pytest.mark.parametrize(
        "text, code",
        [
            (script.format(lapsum_suite.PASSED, 1.0, lapsum_suite.FAILED), 0),
            (script.format(lapsum_suite.PASSED, 2.0, lapsum_suite.FAILED), 1),
            ("print('nothing is checked')\n", 1),
            (script.format(lapsum_suite.PASSED, 1.0, lapsum_suite.FAILED) + guarded_raise, 1),
            ("def test_one():\n    import lapsum.topk\n    assert lapsum.topk.soft_topk\n", 0),
            ("def test_one():\n    assert False\n", 1),
        ],
    )
    def test_exit_codes(self, tmp_path, text, code):
        (tmp_path / "test_it.py").write_text(text)
        found = self.run(tmp_path)
        assert found.returncode == code, found.stdout + found.stderr
        assert not list(tmp_path.rglob("__pycache__"))

    def test_no_tests(self, tmp_path):
        assert self.run(tmp_path).returncode == 2

    @pytest.mark.skipif("SOFTTOPK_PEER_LAPSUM" not in os.environ, reason="SOFTTOPK_PEER_LAPSUM is not set")
    def test_all_of_their_checks_pass(self):
        """They accept errors up to 0.1; ours must be within the error of the differences they take."""
        found = self.run(os.environ["SOFTTOPK_PEER_LAPSUM"])
        assert found.returncode == 0, found.stdout + found.stderr
        widths = [float(w) for w in re.findall(r"within atol (\S+)", found.stdout)]
        assert widths and max(widths) <= 1e-6


def test_absent_is_recorded_as_none():
    def function(*_):
        raise Absent("no dim")

    assert outcome(FEATURES["any dim, backward"], implementation(function), "cpu") == "none: no dim"
