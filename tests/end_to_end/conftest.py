"""Fixtures for small training runs, and signals at a chosen moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quickstart_runs import Workshop

from specforge.__main__ import main


@pytest.fixture(scope="session")
def row_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenised rows for all runs."""
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, row_cache: Path) -> Workshop:
    """A folder of runs shared by the tests of a module."""
    return Workshop(tmp_path_factory.mktemp("shared"), row_cache)


@pytest.fixture
def workshop(tmp_path: Path, row_cache: Path) -> Workshop:
    """A folder of runs for one test."""
    return Workshop(tmp_path, row_cache)


@pytest.fixture
def fit(workshop: Workshop) -> Callable[..., Path]:
    """Run ``specforge fit`` in this process and return the run's folder."""

    def run(output_dir: str, *more: str, status: int = 0) -> Path:
        assert main(["fit", *workshop.words(output_dir, *more)]) == status
        return workshop.run_folder(output_dir)

    return run


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send a signal during the n-th batch from now on, of training or of another stage."""
    from specforge.training.module import DraftModule

    originals = {name: getattr(DraftModule, name) for name in ("training_step", "validation_step")}

    def arm(batch_number: int, stage: str = "training_step", number: int = signal.SIGINT) -> None:
        seen = 0

        def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
            nonlocal seen
            seen += 1
            if seen == batch_number:
                os.kill(os.getpid(), number)
            return originals[stage](self, batch, batch_idx)

        monkeypatch.setattr(DraftModule, stage, step)

    return arm
