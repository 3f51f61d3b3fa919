"""Metrics of draft steps, exact over batches and ranks of different size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from specforge.training.distillation import DraftSteps


class StepMeans(Metric):
    """Means over supervised rows at each step: every objective, acceptance probability and top-1 agreement.

    Args:
        terms: Names of the objectives.
        steps: Number S of draft steps.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, terms: Sequence[str], steps: int) -> None:
        super().__init__()
        self.quantities = (*terms, "acceptance", "agreement")
        # Means over millions of rows lose digits when they are summed in float32, but Apple's GPUs know no more.
        wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("sums", torch.zeros(len(self.quantities), steps, dtype=wide), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(steps, dtype=wide), dist_reduce_fx="sum")

    def update(self, outcome: DraftSteps) -> None:
        """Add a batch."""
        self.sums += step_sums(outcome)
        self.counts += outcome.supervised.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Return ``{"<quantity>/step_<k>": mean}``; steps that no row reached are left out."""
        means = (self.sums / self.counts.clamp(min=1)).float()
        return {
            f"{quantity}/step_{step}": means[row, step]
            for row, quantity in enumerate(self.quantities)
            for step in range(means.shape[1])
            if self.counts[step] > 0
        }


def step_sums(outcome: DraftSteps) -> Tensor:
    """Return the sums over supervised rows of each objective, acceptance and agreement, [quantities, S]."""
    return torch.stack([*outcome.terms.values(), outcome.acceptance.sum(1), outcome.agreement.sum(1)])
