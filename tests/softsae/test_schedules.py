"""Schedules at their corners, with lengths of 0 included."""

from __future__ import annotations

import pytest

from softsae import AutoencoderConfig, RunConfig, TrainConfig
from softsae.config import resolve
from softsae.schedules import Schedule, linear


def schedule(**train) -> Schedule:
    fields = {"steps": 100, "lr": 1.0, "warmup_steps": 10, "hard_steps": 20, **train}
    return Schedule(resolve(RunConfig(AutoencoderConfig(n=256, k=8.0), TrainConfig(**fields)), 64))


def test_k_target_falls_from_d_to_k():
    phases = schedule(k_anneal_steps=50)
    assert [phases.phase(s).k_target for s in (0, 25, 50, 99)] == [64, 36, 8, 8]


def test_alpha_falls_from_start_to_final():
    phases = schedule(alpha_start=1.0, alpha_anneal_steps=10)
    assert [phases.phase(s).alpha for s in (0, 5, 10, 99)] == pytest.approx([1, 0.50005, 1e-4, 1e-4])


def test_schedules_of_no_length_are_at_their_end_from_the_first_step():
    phases = schedule(k_anneal_steps=0, alpha_start=1.0, alpha_anneal_steps=0, warmup_steps=0, hard_steps=0)
    assert phases.phase(0)[:3] == (1e-4, 8.0, False)
    assert phases.lr(0) == 1.0
    assert not any(phases.phase(s).hard for s in range(100))
    assert linear(0, 0, 5.0, 2.0) == 2.0


def test_last_steps_are_hard_and_learn_as_configured():
    phases = schedule(hard_phase="decoder")
    assert [phases.phase(s).hard for s in (0, 79, 80, 99)] == [False, False, True, True]
    assert [phases.phase(s).learns for s in (79, 80)] == ["all", "decoder"]
    assert all(schedule(hard_steps=100).phase(s).hard for s in range(100))


def test_learning_rate_rises_stays_and_falls():
    rate = schedule().lr
    assert [rate(s) for s in (0, 4, 9, 50, 80)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert rate(90) == pytest.approx(0.5) and rate(99) == pytest.approx(0.05)
    assert schedule(decay_from=1.0).lr(99) == 1.0
    assert schedule(decay_from=0.0, warmup_steps=0).lr(50) == pytest.approx(0.5)
