"""Which rows each step of a chain runs: those that it is supervised at, or a later step, which reads its states.

Rows are run in an order in which those of every step come first, so that what a step reads of the step before is a
view. All other rows are only attended to: they leave their keys and values at step 0.

Letters in shapes: S steps, N rows (a flattened batch), P pairs of row and step that are run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftRows:
    """The rows of a chain.

    Attributes:
        order: All rows, int64 [N]: first those that most steps run, last those that none runs.
        counts: How many rows each of the S steps runs, the first so many of ``order``; they never rise.
    """

    order: Tensor
    counts: tuple[int, ...]

    @classmethod
    def needed(cls, supervised: Tensor) -> Self:
        """Find the fewest rows that a chain has to run.

        Args:
            supervised: Which rows count at each step, bool [S, N].
        """
        steps = torch.arange(len(supervised), device=supervised.device)[:, None]
        # Row t runs steps 0 .. j, where j is the last step that it is supervised at.
        depth = ((steps + 1) * supervised).amax(0)
        # Where nothing counts, one row runs all the same: weights without a gradient hold up other processes.
        counts = (depth > steps).sum(1).clamp(min=1).tolist()
        return cls(depth.argsort(descending=True, stable=True), tuple(counts))

    @classmethod
    def all(cls, steps: int, rows: int, device: torch.device) -> Self:
        """Run every row at every step.

        Args:
            steps: Number S of steps.
            rows: Number N of rows.
            device: Where the rows are.
        """
        return cls(torch.arange(rows, device=device), (rows,) * steps)

    def places(self) -> Tensor:
        """Return where the state of a row and step stands among the P of all steps, one step behind the other.

        Returns:
            int64 [S, N]; -1 where a row is not run.
        """
        places = torch.full((len(self.counts), len(self.order)), -1, device=self.order.device)
        numbers = torch.arange(sum(self.counts), device=self.order.device).split(self.counts)
        for of_step, count, own in zip(places, self.counts, numbers, strict=True):
            of_step[self.order[:count]] = own
        return places
