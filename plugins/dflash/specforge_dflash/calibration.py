"""Sequential temperature scaling of DSpark's confidence, and how far confidence is from what happens.

The survival of a token is the product of the confidences up to it: the predicted probability that all of them are
accepted. From the first slot to the last, each slot's log-odds are divided by the temperature of a grid that makes the
survivals up to it fit best, given the temperatures before it.

Letters in shapes: S steps, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.moving import moved
from specforge.training.module import Drafted
from specforge.training.totals import total

# 1/8 .. 8, eight to an octave.
GRID = [2 ** (step / 8) for step in range(-24, 25)]
BINS = 15


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        temperatures: Of each slot, [S].
        error: Expected calibration error of the survivals with them, the mean over all slots.
        raw_error: The same without.
    """

    temperatures: list[float]
    error: float
    raw_error: float


class ConfidenceRecord:
    """Confidence and acceptance of all pairs of a validation, of this process."""

    def __init__(self) -> None:
        self._log_odds: list[Tensor] = []
        self._accepted: list[Tensor] = []
        self._counted: list[Tensor] = []

    def add(self, drafted: Drafted, accepted: Tensor) -> None:
        """Add a batch.

        Args:
            drafted: What the draft computed; the last column of its states is the confidence, in log-odds.
            accepted: How probable it is that each pair's token is accepted, [S, N].
        """
        rows = drafted.supervised[0].nonzero()[:, 0]
        found = rows, drafted.state_index[:, rows].clamp(min=0), drafted.supervised[:, rows]
        rows, states, counted = moved(found, accepted.device)
        self._log_odds.append(drafted.states[states, -1].float())
        self._accepted.append(accepted[:, rows].float())
        self._counted.append(counted)

    def calibrated(self) -> Calibration:
        """Find the temperatures; every process must call this, and all find the same."""
        log_odds, counted = torch.cat(self._log_odds, dim=1), torch.cat(self._counted, dim=1)
        survived = torch.cat(self._accepted, dim=1).cumprod(0)
        predicted, raw = torch.ones_like(log_odds[0]), torch.ones_like(log_odds[0])
        temperatures, errors, numbers = [], [], []
        for step, own in enumerate(counted):
            raw = raw * log_odds[step].sigmoid()
            tried = [*(predicted * (log_odds[step] / one).sigmoid() for one in GRID), raw]
            histograms = torch.stack([_histogram(one[own], survived[step, own]) for one in tried])
            counts, confidences, outcomes = total(histograms).unbind(1)
            number = counts[0].sum()
            by_choice = (confidences - outcomes).abs().sum(1) / number.clamp(min=1)
            best = int(by_choice[:-1].argmin()) if number else GRID.index(1.0)
            temperatures.append(GRID[best])
            predicted = tried[best]
            errors.append(torch.stack([by_choice[best], by_choice[-1]]))
            numbers.append(number)
        weights = torch.stack(numbers)
        error, raw_error = ((torch.stack(errors).T * weights).sum(1) / weights.sum().clamp(min=1)).tolist()
        return Calibration(temperatures, error, raw_error)


def _histogram(confidences: Tensor, outcomes: Tensor) -> Tensor:
    """Add up pairs by confidence, in bins of equal width: number, confidences and outcomes, [3, BINS]."""
    bins = (confidences * BINS).long().clamp(max=BINS - 1)
    values = torch.stack([torch.ones_like(confidences), confidences, outcomes])
    return values.new_zeros(3, BINS).index_add_(1, bins, values)
