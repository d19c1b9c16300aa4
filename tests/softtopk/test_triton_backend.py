"""What is particular to the Triton backend: chunked rows, numbers as bits, strides, compilation."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softtopk import dispatch
from softtopk.backends import reference
from tests.accuracy import FORMS, oracle, ratios, run
from tests.cases import make
from tests.conftest import device_of

kernels, missing = dispatch.load("triton")
pytestmark = pytest.mark.skipif(kernels is None, reason=f"triton: {missing}")
DEVICE = device_of("triton")
ROOT = Path(__file__).parents[2]


def small_tiles(name: str, choice, itemsize: int, n: int, kept: bool) -> dict[str, int | bool]:
    """launch.tile with tiles of 16 elements: of a row that is kept, or of one that is read again."""
    options = dict(num_warps=choice.num_warps, maxnreg=choice.maxnreg, BLOCK=16)
    tiles = 1 << (-(-n // 16) - 1).bit_length() if kept else 0
    if name == "log":
        return options
    if name == "forward":
        full = n % 16 == 0 and (not kept or n == 16 * tiles)
        groups = min(2, tiles) if kept else 1
        shape = dict(TILES=tiles, DEPTH=2, LANES=8, GROUPS=groups, SLOTS=2)
        return options | shape | dict(FULL=full, KEEP=kept and n % 2 == 1)
    if name == "backward":
        keep = dict(KEEP_X=kept, KEEP_V=kept and n % 2 == 1)
        return options | keep | dict(TILES=max(tiles, 1), FULL=n % (16 * max(tiles, 1)) == 0)
    return options | dict(RESIDENT=False)


@pytest.fixture(params=["read again", "kept"])
def tiny_chunks(request, monkeypatch):
    """Rows are swept 16 elements at a time, and soft_topk finds candidates by the maxima of 8 lanes."""
    from softtopk.backends.triton import launch

    monkeypatch.setattr(launch, "tile", functools.partial(small_tiles, kept=request.param == "kept"))
    return launch


def case(family: str, n: int):
    k = torch.tensor([1.0, 0.3 * n, n - 0.5], dtype=torch.float64)
    x = make(family, len(k), n, seed=n)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(n))
    return x.to(DEVICE), k.to(DEVICE), v.to(DEVICE)


@pytest.mark.parametrize("alpha", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("family", ["relu", "tied", "outlier", "narrow"])
@pytest.mark.parametrize("n", [17, 64, 75])
@pytest.mark.parametrize("form", FORMS)
def test_chunked_rows_meet_the_bars(tiny_chunks, form, family, n, alpha):
    if DEVICE == "cpu" and (n == 75 or alpha == 1e-2):
        pytest.skip("too slow in Triton's interpreter")
    x, k, v = case(family, n)
    got, want = run(kernels, x, k, alpha, v, form=form), oracle(x, k, alpha, v, form=form)
    over = {name: r for name, r in ratios(got, want, k, alpha, v, form).items() if not r <= 1}
    assert not over, f"times the bar: {over}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [True, False])
def test_chunked_rows_equal_resident_rows(form, dtype, kept):
    if DEVICE == "cpu" and dtype in (torch.float16, torch.float64):
        pytest.skip("too slow in Triton's interpreter")
    from softtopk.backends.triton import launch

    x, k, v = case("relu", 75)
    x, v = x.to(dtype), v.to(dtype)

    def both():
        return run(kernels, x, k, 0.1, v, True, form), run(kernels, x, 7.5, 0.1, v, False, form)

    resident = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tile", functools.partial(small_tiles, kept=kept))
        chunked = both()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for a, b in zip(resident, chunked, strict=True):
        for name, one in vars(a).items():
            torch.testing.assert_close(one, vars(b)[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("largest", [True, False])
def test_chunked_hard_topk(tiny_chunks, largest):
    x = (torch.randn(6, 75, generator=torch.Generator().manual_seed(0)) * 2).round()
    x[0, ::3], x[1, ::4], x[2, 5] = torch.inf, -torch.inf, torch.nan
    k = torch.tensor([3.0, 70.0, 5.0, 0.0, 37.5, torch.nan], dtype=torch.float64)
    want = reference.hard_topk_mask(x, k, largest)
    got = kernels.hard_topk_mask(x.to(DEVICE), k.to(DEVICE), largest).cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    for max_k in (1, 20, 100):
        want = reference.hard_topk_indices(x, k, max_k, largest)
        got = kernels.hard_topk_indices(x.to(DEVICE), k.to(DEVICE), max_k, largest)
        assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("k, alpha", [(7.0, 0.1), (7.000000001, 1e-3), (0.0, 1.0), (30.999999999, 1e-20)])
def test_a_number_is_the_same_as_a_tensor(k, alpha):
    """A Python float given to a kernel as such would be rounded to float32."""
    x, _, v = case("normal", 31)
    tensor_k = torch.full((3,), k, dtype=torch.float64, device=DEVICE)
    tensor_alpha = torch.full((3,), alpha, dtype=torch.float64, device=DEVICE)
    number, tensor = run(kernels, x, k, alpha, v), run(kernels, x, tensor_k, tensor_alpha, v)
    for name, one in vars(number).items():
        assert torch.equal(one, vars(tensor)[name]), name
    one_for_all = run(kernels, x, tensor_k[:1].expand(3), tensor_alpha[:1].expand(3), v)
    assert torch.equal(one_for_all.p, number.p) and torch.equal(one_for_all.grad_k, number.grad_k)


def test_strides():
    wide = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    views = (wide.t(), wide.t()[::2, 3::2], wide[:3, 1:].t(), wide[0].expand(4, 6), wide[:3, :1].expand(3, 5))
    for x in views:
        v = torch.randn(x.shape[::-1], generator=torch.Generator().manual_seed(1)).t().to(DEVICE)
        before = x.clone()
        got, want = run(kernels, x, 2.5, 0.1, v), run(kernels, x.contiguous(), 2.5, 0.1, v.contiguous())
        for name, one in vars(got).items():
            assert torch.equal(one, vars(want)[name]), name
        assert torch.equal(kernels.hard_topk_mask(x, 2.5), kernels.hard_topk_mask(x.contiguous(), 2.5))
        assert torch.equal(x, before)
    ones = torch.ones((), device=DEVICE).expand(6, 40)  # the gradient of a sum
    got, want = (run(kernels, wide.t(), 2.5, 0.1, v) for v in (ones, ones.contiguous()))
    assert torch.equal(got.grad_x, want.grad_x) and torch.equal(got.grad_alpha, want.grad_alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_over_the_whole_range_of_a_type(dtype):
    """Powers of two from denormal to the largest, both signs, zeros and ties: counts alone mislead."""
    info = torch.finfo(dtype)
    exponents = torch.linspace(-149, 127, 24) if dtype == torch.float32 else torch.linspace(-1074, 1023, 24)
    powers = 2.0 ** exponents.round().double()
    x = torch.cat([powers, -powers, torch.tensor([0.0, -0.0, 1, 1, 1, info.max, -info.max])]).to(dtype)
    k = torch.arange(1, x.numel() + 1, 4).double()
    x = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))].expand(len(k), -1)
    got = kernels.hard_topk_mask(x.to(DEVICE), k.to(DEVICE)).cpu()
    assert torch.equal(got, reference.hard_topk_mask(x, k))
    p, _ = kernels.soft_topk_forward(x.to(DEVICE), k.to(DEVICE), 1e-6)
    want, _ = reference.soft_topk_forward(x.double(), k, 1e-6)
    assert (p.cpu().double() - want).abs().max() <= 1e-6


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    """Rows beyond 65,535 and offsets beyond 32 bits."""
    rows, n = (1 << 16) + 1, 1 << 15
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    x = torch.zeros(rows, n, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(n, device="cuda")
    p, solution = kernels.soft_topk_forward(x, 32.0, 0.01)
    alone, alone_solution = kernels.soft_topk_forward(x[-1:].clone(), 32.0, 0.01)
    assert torch.equal(p[-1:], alone) and torch.equal(solution[-1:], alone_solution)
    assert (p[:-1] == p[0, 0]).all() and p[0, 0].item() == 32 / n


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """Autotuning switched on, with an empty cache and a timer by which the last choice is fastest."""
    from softtopk.backends.triton import autotune

    timed = []

    def milliseconds(run):
        run()
        timed.append(run)
        return 1 / len(timed)

    monkeypatch.setenv("SOFTTOPK_AUTOTUNE", "1")
    monkeypatch.setenv("SOFTTOPK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "chosen", {})
    monkeypatch.setattr(autotune, "can_time", lambda x: True)
    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(autotune, "timed", timed, raising=False)
    return autotune


def test_autotuning_times_once_and_remembers(tuner, monkeypatch, tmp_path):
    from softtopk.backends.triton import launch

    x, k, v = case("relu", 75)
    first, _ = kernels.soft_topk_forward(x, k, 0.1)
    number = len(tuner.timed)
    options = launch.choices("forward", 4, 75)
    assert number == len(options) > 1 and options[0] == launch.default("forward", 4, 75)
    (key, stored), *others = json.loads((tmp_path / "triton.json").read_text()).items()
    assert "forward|float32|256" in key and tuple(stored) == options[-1] and not others
    again, _ = kernels.soft_topk_forward(x, k, 0.1)
    assert len(tuner.timed) == number and torch.equal(first, again)

    monkeypatch.setattr(tuner, "chosen", {})  # as another process would start
    kernels.soft_topk_forward(x, k, 0.1)
    assert len(tuner.timed) == number and list(tuner.chosen.values()) == [options[-1]]
    kernels.soft_topk_forward(x.double(), k, 0.1)  # another dtype
    assert len(tuner.timed) > number and len(json.loads((tmp_path / "triton.json").read_text())) == 2


def test_autotuning_takes_the_default_where_it_cannot_time(tuner, monkeypatch, tmp_path):
    """As while a CUDA graph is captured. A later call does not time either: the bits would change."""
    from softtopk.backends.triton import launch

    x, k, _ = case("relu", 75)
    monkeypatch.setattr(tuner, "can_time", lambda x: False)
    kernels.soft_topk_forward(x, k, 0.1)
    monkeypatch.setattr(tuner, "can_time", lambda x: True)
    kernels.soft_topk_forward(x, k, 0.1)
    assert list(tuner.chosen.values()) == [launch.default("forward", 4, 75)]
    assert not tuner.timed and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"KEY": [3, 64]}', '{"KEY": "x"}', '{"KEY": null}'])
def test_autotuning_ignores_a_spoilt_cache(tuner, tmp_path, text):
    x, k, _ = (t[:1] for t in case("relu", 75))
    kernels.soft_topk_forward(x, k, 0.1)
    (key,) = tuner.chosen
    number = len(tuner.timed)
    (tmp_path / "triton.json").write_text(text.replace("KEY", key))
    tuner.chosen.clear()
    kernels.soft_topk_forward(x, k, 0.1)
    assert len(tuner.timed) == 2 * number


def test_without_autotuning_nothing_is_timed(tuner, monkeypatch, tmp_path):
    monkeypatch.delenv("SOFTTOPK_AUTOTUNE")
    x, k, _ = case("relu", 75)
    kernels.soft_topk_forward(x, k, 0.1)
    assert not tuner.timed and not tuner.chosen and not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_autotuning_on_a_gpu(monkeypatch, tmp_path):
    """Really timed; and in a process that captures a graph first, not at all."""
    from softtopk.backends.triton import autotune

    monkeypatch.setenv("SOFTTOPK_AUTOTUNE", "1")
    monkeypatch.setenv("SOFTTOPK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "chosen", {})
    x, k, v = case("relu", 4096)
    want = reference.soft_topk_forward(x.double(), k, 0.1)[0]
    assert (kernels.soft_topk_forward(x, k, 0.1)[0] - want).abs().max() <= 1e-6
    assert len(json.loads((tmp_path / "triton.json").read_text())) == 1
    autotune.chosen.clear()
    (tmp_path / "triton.json").unlink()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p, _ = kernels.soft_topk_forward(x, k, 0.1)
    graph.replay()
    assert (p - want).abs().max() <= 1e-6
    assert not list(tmp_path.iterdir()) and len(autotune.chosen) == 1


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_reason_is_given():
    done = python("-c", "import softtopk; print(softtopk.available_backends()['triton'])")
    assert "no GPU is visible" in done.stdout and "TRITON_INTERPRET=1" in done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="triton's ptxas is a Linux program")
def test_kernels_compile_without_a_gpu(tmp_path):
    script = str(Path(__file__).with_name("compile_triton.py"))
    done = python(script, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bytes") == 81
