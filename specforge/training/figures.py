"""Figures of an optimizer step: the loss and means that training logs."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from specforge.training.losses.distillation import DraftSteps
from specforge.training.metrics import quantities, step_sums
from specforge.training.totals import processes, total


class StepFigures:
    """Adds up the batches of an optimizer step, over all processes."""

    def __init__(self) -> None:
        self._so_far: tuple[Tensor, ...] | None = None

    def add(self, outcome: DraftSteps, more_follow: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Add a batch.

        Args:
            outcome: Its results in this process.
            more_follow: Whether the optimizer step has further batches.

        Returns:
            The loss so far, and the means by quantity, [S] each.
        """
        figures = _over_processes(outcome)
        if self._so_far is not None:
            figures = tuple(earlier + own for earlier, own in zip(self._so_far, figures, strict=True))
        self._so_far = figures if more_follow else None
        loss, sums, counts = figures
        return loss, dict(zip(quantities(outcome.terms), sums / counts.clamp(min=1), strict=True))


class BarFigures:
    """Shows figures in the progress bar, at most once a second: to read them is to wait for the device."""

    def __init__(self) -> None:
        self._due = 0.0

    def show(self, trainer: Trainer, figures: Mapping[str, Tensor]) -> None:
        """Show figures if it is time.

        Args:
            trainer: Its progress bar, if it has one, shows them. Logged figures are read at every step there.
            figures: Scalars by name.
        """
        now = time.monotonic()
        if trainer.progress_bar_callback is None or not trainer.is_global_zero or now < self._due:
            return
        self._due = now + 1
        values = torch.stack(list(figures.values())).tolist()
        trainer.progress_bar_metrics.update(zip(figures, values, strict=True))


def _over_processes(outcome: DraftSteps) -> tuple[Tensor, ...]:
    """Return the loss, the sums by quantity and step, and the counts by step, of all processes together."""
    sums, counts = step_sums(outcome), outcome.supervised.sum(1)
    shares = outcome.loss.detach() / processes()
    every = total(torch.cat([shares[None], counts.to(sums.dtype), sums.flatten()]))
    loss, counts, flat = every.split([1, counts.numel(), sums.numel()])
    return loss[0], flat.view_as(sums), counts
