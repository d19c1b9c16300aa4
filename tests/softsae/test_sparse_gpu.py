"""Sparse trainings on a GPU: recorded steps against steps as they are, and no waiting within them."""

from __future__ import annotations

import pytest
import torch

from softsae import AutoencoderConfig, EstimatorConfig, SoftSAEConfig, Trainer
from softsae.graph import WARM_UP, Recorder
from softsae.losses import RegularizerConfig
from tests.softsae.sparse_cases import CASES, SOURCE, Roomy, records, trainer

pytestmark = pytest.mark.gpu
GPU = {"device": "cuda", "log_every": 1}


@pytest.fixture
def numbers_on_the_device(monkeypatch):
    """Steps as they are, but with their numbers where a graph has them."""

    def recorder(self, source, held_out=None, start=Trainer.start):
        start(self, source, held_out)
        if not self.config.train.cuda_graph:
            self.run_step = Recorder(self.one_step, self.device, stream=None)

    monkeypatch.setattr(Trainer, "start", recorder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_are_the_steps(name, path, dtype, numbers_on_the_device):
    """60 steps with AuxK from about step 10 on and a hard phase from 45 on: a graph for each."""
    train = {**GPU, "path": path, "dtype": dtype}
    one, expected = records(name, cuda_graph=False, **train)
    other, found = records(name, cuda_graph=True, **train)
    assert other.run_step.graph is not None
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key.startswith(("loss", "grad_norm", "estimator_grad", "l0", "k_hat")):
                assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (ours["step"], key)
    for parameter, same in zip(one.sae.parameters(), other.sae.parameters(), strict=True):
        torch.testing.assert_close(same, parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["topk", "softsae-wide", "softsae-bottleneck-all", "softsae-published"])
def test_dense_steps_in_parts(name, dtype, numbers_on_the_device):
    """Recorded, as they are, and of the whole batch."""
    train = {**GPU, "path": "dense", "dtype": dtype}
    _, whole = records(name, cuda_graph=False, rows_at_a_time=64, **train)
    _, expected = records(name, cuda_graph=False, rows_at_a_time=24, **train)
    _, found = records(name, cuda_graph=True, rows_at_a_time=24, **train)
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "l0", "k_hat_mean"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (ours["step"], key)
    for ours, theirs in zip(expected[:3], whole[:3], strict=True):
        for key in ("loss", "grad_norm", "k_hat_mean"):
            assert ours[key] == pytest.approx(theirs[key], rel=0.03 if dtype == "bfloat16" else 1e-3), key


@pytest.mark.parametrize("name", ["topk", "batchtopk", "msae", "adaptivek", "softsae-wide"])
def test_a_sparse_training_begins_as_the_dense_one(name):
    train = {**GPU, "steps": 20, "hard_steps": 0, "cuda_graph": False}
    (_, dense), (_, sparse) = (records(name, path=path, **train) for path in ("dense", "sparse"))
    for ours, theirs in zip(sparse[:8], dense[:8], strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (ours["step"], key)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["topk", "topk-nested", "softsae-wide", "batchtopk", "msae"])
def test_the_host_waits_for_nothing_between_logged_steps(name, path, graph):
    """Steps 41 ... 59: the measurement and the list of the dead are read and renewed there too."""

    class Quiet(Roomy):
        def advance(self, batch, consumed):
            if self.step == 40:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            elif self.step == 59:  # the last step is logged: its numbers are read on the host
                torch.cuda.set_sync_debug_mode("default")
            return super().advance(batch, consumed)

    class Batches:
        d = SOURCE.d

        def batches(self, size, seed, start=0):
            """On the device and finite, so that reading them does not wait."""
            for batch in SOURCE.batches(size, seed, start):
                yield batch.cuda()

    from softsae import lockstep

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lockstep, "finite", lambda batch, *_: batch)
        train = {**GPU, "log_every": 60, "path": path, "cuda_graph": graph, "hard_steps": 0}
        train["rows_at_a_time"] = 24
        try:
            run = trainer(name, kind=Quiet, **train)
            run.fit(Batches())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.step == 60


def test_a_step_is_recorded_anew_only_when_its_kernels_change(monkeypatch):
    captured = []
    capture = Recorder.capture

    def counting(self, *arguments):
        captured.append(self.key)
        capture(self, *arguments)

    monkeypatch.setattr(Recorder, "capture", counting)
    CASES["bottleneck"] = (
        AutoencoderConfig(n=256, k=8, softsae=SoftSAEConfig(estimator=EstimatorConfig("bottleneck", 16))),
        {},
    )
    try:
        records("bottleneck", path="sparse", auxk_weight=0.0, steps=60, hard_steps=20, **GPU)
    finally:
        del CASES["bottleneck"]
    assert len(captured) == len(set(captured)) == 2  # the soft phase and the hard one
    assert WARM_UP < 20


def test_a_regularized_step_is_recorded_as_well():
    regularizer = RegularizerConfig(r1_weight=0.1, r2_weight=0.1)
    (_, a), (_, b) = (
        records("topk", path="dense", steps=12, hard_steps=0, regularizer=regularizer, cuda_graph=g, **GPU)
        for g in (False, True)
    )
    assert [r["loss"] for r in b] == pytest.approx([r["loss"] for r in a], rel=1e-4)


def test_interrupted_and_resumed_goes_on_as_without(tmp_path):
    train = {**GPU, "path": "auto", "sparse_below": 0.1, "dtype": "bfloat16", "dead_after": 300}
    whole, _ = records("softsae-wide", **train)

    def stop(run, record):
        if record["step"] == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer("softsae-wide", tmp_path, [stop], **train).fit(SOURCE)
    last = trainer("softsae-wide", tmp_path, **train)
    last.fit(SOURCE)
    for a, b in zip(whole.sae.parameters(), last.sae.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep_copies", [False, True])
def test_memory_is_accounted_for(keep_copies):
    run, found = records("softsae-wide", path="sparse", dtype="bfloat16", keep_copies=keep_copies, **GPU)
    memory = found[-1]["memory"]
    assert all("memory" not in record for record in found[:-1])
    floats = sum(parameter.numel() for parameter in run.sae.parameters())
    matrices = sum(p.numel() for p in run.sae.parameters() if p.dim() == 2)
    assert memory["parameters"] == memory["gradients"] == 4 * floats
    assert memory["copies"] == 2 * matrices * keep_copies
    assert memory["optimizer"] == 8 * floats + 4 * len(list(run.sae.parameters()))
    parts = [value for name, value in memory.items() if name != "peak"]
    assert sum(parts) == memory["peak"] and memory["rest"] > 0


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_recorded_training_has_no_second_workspace_of_cublas(path):
    """Which keeps one for every stream: all of a training is done on the stream of its steps."""

    def workspaces(graph: bool) -> int:
        torch._C._cuda_clearCublasWorkspaces()
        run, _ = records("softsae-wide", path=path, dtype="bfloat16", cuda_graph=graph, **GPU)
        held = torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()
        assert (run.stream is not None) == graph
        return held - torch.cuda.memory_allocated()

    assert workspaces(graph=True) == workspaces(graph=False) > 0


def test_the_autoencoder_is_the_one_of_the_cpu():
    on_gpu, _ = records("topk", path="sparse", cuda_graph=True, **GPU)
    on_cpu, _ = records("topk", path="sparse", log_every=1)
    torch.testing.assert_close(on_gpu.sae.W_enc.cpu(), on_cpu.sae.W_enc, rtol=0, atol=5e-3)
