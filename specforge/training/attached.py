"""What callbacks ask a trainer: its other callbacks, and whether a validation is part of a training run."""

from __future__ import annotations

from typing import TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

FIT = TrainerFn.FITTING.value
Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """Return a trainer's callbacks of a class, in order.

    Args:
        trainer: The trainer.
        kind: The class.
    """
    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it and does not declare it
    return [one for one in every if isinstance(one, kind)]


def is_fitting(trainer: Trainer) -> bool:
    """Return whether a trainer trains or validates during training; not ``validate`` or the sanity check."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
