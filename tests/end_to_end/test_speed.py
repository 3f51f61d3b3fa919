"""The logged cost of a run: its share of time waiting for data, and its memory."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import scalars

from specforge.data.packing import PackedRows
from specforge.training.module import DraftModule


def test_idle_share_is_the_loaders_share_of_the_time(workshop, fit, monkeypatch):
    """On a clock that advances by 4 per batch read, by 5 per training step, and by 1,000 per validation batch."""
    now = 0.0

    def moved_by(seconds: float, function: Any) -> Any:
        def call(*words: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*words)

        return call

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("specforge.data.loader.time", clock)
    monkeypatch.setattr("specforge.training.callbacks.speed.time", clock)
    monkeypatch.setattr(PackedRows, "__getitems__", moved_by(4, PackedRows.__getitems__))
    monkeypatch.setattr(DraftModule, "training_step", moved_by(5, DraftModule.training_step))
    monkeypatch.setattr(DraftModule, "validation_step", moved_by(1000, DraftModule.validation_step))
    words = ["--trainer.max_steps=8", "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=3"]
    run = fit("runs", *words, "--data.batch_size=2")
    assert [value for _, value in scalars(run, "train/idle_share")] == pytest.approx([4 / 9] * 4)
    assert all(value < 256 * 2 * 2 / 9 for _, value in scalars(run, "train/tokens_per_second"))


def test_memory_is_the_peak_of_this_process(fit):
    run = fit("runs", "--trainer.max_steps=3")
    memory = [value for _, value in scalars(run, "train/peak_memory_gb")]
    assert memory == sorted(memory)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert 0.1 < memory[-1] <= int(peak[1]) * 1024 / 1e9 * 1.01
