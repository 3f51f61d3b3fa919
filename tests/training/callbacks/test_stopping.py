"""Errors caused by lost processes or memory, distinguished from the run's own errors."""

from __future__ import annotations

import pytest
import torch

from specforge.training.callbacks.stopping import explain_lost


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a DataLoader worker"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "a DataLoader worker"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "out of memory: CUDA out of memory"),
    ],
)
def test_the_loss_is_explained(error: RuntimeError, expected: str) -> None:
    assert expected in str(explain_lost(error))


def test_an_error_in_a_dataloader_worker_is_not_mistaken_for_its_loss() -> None:
    text = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n..."
    assert explain_lost(RuntimeError(text)) is None


def test_a_loss_during_logging_is_reported_too() -> None:
    wrapped = ValueError("you tried to log 0.5 which is currently not supported")
    assert explain_lost(wrapped) is None
    wrapped.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "a DataLoader worker" in str(explain_lost(wrapped))
