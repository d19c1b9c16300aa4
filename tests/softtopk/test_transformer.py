"""benchmarks/transformer.py: the operator inside a model under autocast, torch.compile and a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from benchmarks.transformer import run


def test_compiled_training_follows_eager_training():
    """The same graph without code generation: losses equal but for what bfloat16 rounds."""
    torch._dynamo.reset()
    eager, compiled = run("cpu", steps=4, size=4, compile_with="aot_eager")
    assert compiled["losses"] == pytest.approx(eager["losses"], abs=0.02)  # bfloat16
    assert eager["losses"][0] != pytest.approx(eager["losses"][-1], abs=1e-3)


@pytest.mark.gpu
def test_a_captured_step_and_compiled_training_follow_eager_training():
    torch._dynamo.reset()
    eager, compiled, graph = run("cuda", steps=300, size=128)
    assert graph["losses"] == pytest.approx(eager["losses"], abs=1e-5)
    assert compiled["losses"][:50] == pytest.approx(eager["losses"][:50], abs=0.05)  # bfloat16
    for way in (eager, compiled, graph):
        assert way["last_loss"] < 0.75 * way["first_loss"]
        assert 1 < way["tokens_kept"] < 64
