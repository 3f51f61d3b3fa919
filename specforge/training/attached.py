"""What callbacks ask of a trainer: the others that it has, and whether a validation belongs to a training run."""

from __future__ import annotations

from typing import TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

FIT = TrainerFn.FITTING.value
Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """Return the callbacks of a class that a trainer has, in order.

    Args:
        trainer: The trainer.
        kind: The class.
    """
    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it and does not declare it
    return [one for one in every if isinstance(one, kind)]


def is_fitting(trainer: Trainer) -> bool:
    """Return whether a trainer trains, or validates in between: neither ``validate`` nor the check before the start."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
