"""The number of optimizer steps of a run, and the setting that ends it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from specforge.data.module import data_of
from specforge.errors import UsageError
from specforge.training.attached import callbacks_of

NEEDS_AN_END = (
    "set trainer.max_steps or trainer.max_epochs: the learning-rate schedule spans the whole run, so it needs "
    "its last step"
)


def settle_length(trainer: Any) -> None:
    """Set one epoch if nothing else ends the run; Lightning would train 1,000.

    Args:
        trainer: The parsed settings of the trainer; changed in place.

    Raises:
        UsageError: The number of steps is not determined.
    """
    has_steps = trainer.max_steps != -1
    if trainer.max_epochs is None and not has_steps and trainer.max_time is None:
        trainer.max_epochs = 1
    if trainer.max_epochs in (None, -1) and not has_steps and not trainer.fast_dev_run:
        why = "trainer.max_time only ends a run early; " if trainer.max_time is not None else ""
        raise UsageError(f"{why}{NEEDS_AN_END}")


@dataclass(frozen=True)
class RunLength:
    """The length of a run, by Lightning's rules: it ends at ``max_steps`` or ``max_epochs``, whichever comes first.

    Attributes:
        steps: Optimizer steps of the whole run, including those before the checkpoint that it resumes from.
        why: Description of what ends the run.
    """

    steps: int
    why: str

    @classmethod
    def of(cls, trainer: Trainer) -> RunLength:
        """Return the length of a run whose data are set up.

        Raises:
            UsageError: Nothing ends the run, or a setting does not match the number of batches of an epoch.
        """
        by_steps = trainer.max_steps if trainer.max_steps != -1 else None
        epochs = None if trainer.max_epochs in (None, -1) else int(trainer.max_epochs)
        if by_steps is None and epochs is None:
            raise UsageError(NEEDS_AN_END)
        if getattr(trainer, "datamodule", None) is None:  # a dry run without data, with a given number of steps
            return cls(int(by_steps or 0), "trainer.max_steps")
        # Not trainer.estimated_stepping_batches, which makes Lightning forget the loader's position on resuming.
        batches = limited(len(data_of(trainer).train_dataloader()), trainer.limit_train_batches)
        _check_validation(trainer, batches)
        accumulated, duration = trainer.accumulate_grad_batches, _duration(trainer)
        by_epochs = None if epochs is None else epochs * math.ceil(batches / accumulated)
        early = f", or earlier when trainer.max_time is over ({duration})" if duration else ""
        together = f", {accumulated:,} to a step" if accumulated > 1 else ""
        if by_epochs is not None and (by_steps is None or by_epochs <= by_steps):
            return cls(by_epochs, f"trainer.max_epochs {epochs:,}, of {batches:,} batches each{together}{early}")
        return cls(int(by_steps or 0), f"trainer.max_steps; an epoch has {batches:,} batches{together}{early}")

    def __str__(self) -> str:
        """Describe the length in one line."""
        return f"length: {self.steps:,} optimizer step{'s' * (self.steps != 1)} ({self.why})"


def limited(batches: int, limit: int | float) -> int:
    """Return the number of batches of an epoch that are trained on.

    Args:
        batches: Batches of the data.
        limit: ``trainer.limit_train_batches``, a number of batches or a share of them.

    Raises:
        UsageError: The share is less than one batch.
    """
    if isinstance(limit, int):
        return min(batches, limit)
    if 0 < batches * limit < 1:
        raise UsageError(
            f"trainer.limit_train_batches: {limit} of an epoch's {batches:,} batches is less than one; give at "
            f"least {1 / batches:.2g}, or a number of batches"
        )
    return int(batches * limit)


def _check_validation(trainer: Trainer, batches: int) -> None:
    interval = getattr(trainer, "val_check_interval", None)  # missing if a time is set instead
    counts_epochs = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
    if isinstance(interval, int) and counts_epochs and 0 < batches < interval:
        raise UsageError(
            f"trainer.val_check_interval: {interval:,} batches exceed the {batches:,} of an epoch; give "
            "fewer, or set trainer.check_val_every_n_epoch: null to count batches across epochs"
        )


def _duration(trainer: Trainer) -> str:
    seconds = [
        left for one in callbacks_of(trainer, Timer) if (left := one.time_remaining()) is not None
    ]  # all of it, before the start
    return str(timedelta(seconds=min(seconds))) if seconds else ""
