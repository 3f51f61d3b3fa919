"""The number of steps of a run, and what ends it, by Lightning's rules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from specforge.errors import UsageError
from specforge.training.length import RunLength, limited, settle_length

BATCHES = 10


def trainer(**values: Any) -> Any:
    """A trainer's settings, and data of ten batches."""
    data = SimpleNamespace(train_dataloader=lambda: range(BATCHES))
    defaults = {
        "max_steps": -1,
        "max_epochs": None,
        "max_time": None,
        "fast_dev_run": False,
        "limit_train_batches": 1.0,
        "limit_val_batches": 1.0,
        "accumulate_grad_batches": 1,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "callbacks": [],
        "datamodule": data,
    }
    return SimpleNamespace(**(defaults | values))


@pytest.mark.parametrize(
    ("values", "steps", "ended_by"),
    [
        ({"max_steps": 1000}, 1000, "max_steps"),
        ({"max_steps": 1000, "max_epochs": -1}, 1000, "max_steps"),
        ({"max_steps": 1000, "max_epochs": 2}, 20, "max_epochs"),
        ({"max_steps": 15, "max_epochs": 2}, 15, "max_steps"),
        ({"max_epochs": 3}, 30, "max_epochs"),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 9, "max_epochs"),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6, "max_epochs"),
        ({"max_epochs": 3, "limit_train_batches": 0.55}, 15, "max_epochs"),
        ({"max_epochs": 3, "limit_train_batches": 1}, 3, "max_epochs"),
        ({"max_epochs": 0}, 0, "max_epochs"),
        ({"max_steps": 0, "max_epochs": 3}, 0, "max_steps"),
    ],
)
def test_length(values, steps, ended_by):
    length = RunLength.of(trainer(**values))
    assert length.steps == steps
    assert length.why.startswith(f"trainer.{ended_by}") and f"{steps:,} optimizer step" in str(length)


@pytest.mark.parametrize(
    ("values", "max_epochs"),
    [
        ({}, 1),
        ({"max_steps": 5}, None),
        ({"max_epochs": 4}, 4),
        ({"max_steps": 5, "max_epochs": -1}, -1),
        ({"fast_dev_run": 2, "max_epochs": -1}, -1),
    ],
)
def test_one_epoch_is_trained_if_nothing_else_is_set(values, max_epochs):
    settings = trainer(**values)
    settle_length(settings)
    assert settings.max_epochs == max_epochs


@pytest.mark.parametrize("values", [{"max_epochs": -1}, {"max_time": "00:01:00:00"}])
def test_a_run_without_a_last_step_is_refused(values):
    with pytest.raises(UsageError, match=r"set trainer\.max_steps or trainer\.max_epochs"):
        settle_length(trainer(**values))


def test_a_share_below_one_batch_is_refused():
    assert limited(BATCHES, 0.0) == 0 and limited(BATCHES, 0.1) == 1
    with pytest.raises(UsageError, match=r"limit_train_batches: 0\.05 .* at least 0\.1"):
        limited(BATCHES, 0.05)


def test_an_interval_beyond_an_epoch_is_refused_unless_batches_are_counted_across_epochs():
    with pytest.raises(
        UsageError, match=r"val_check_interval: 11 .*the 10 of an epoch; .*check_val_every_n_epoch: null"
    ):
        RunLength.of(trainer(max_epochs=2, val_check_interval=11))
    assert RunLength.of(trainer(max_epochs=2, val_check_interval=11, check_val_every_n_epoch=None)).steps == 20
    assert RunLength.of(trainer(max_epochs=2, val_check_interval=11, limit_val_batches=0)).steps == 20
