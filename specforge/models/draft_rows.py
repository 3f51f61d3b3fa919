"""Which rows each step of a chain runs: those that it is supervised at, or a later step, which reads its states.

Rows are run in an order in which those of every step come first, so that what a step reads of the step before is a
view. All other rows are only attended to: they leave their keys and values at step 0.

Letters in shapes: S steps, N rows (a flattened batch), P pairs of row and step that are run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from specforge.documents import DocumentLayout
from specforge.moving import moved


@dataclass(frozen=True)
class DraftRows:
    """The rows of a chain.

    Attributes:
        order: All rows, int64 [N]: first those that most steps run, last those that none runs.
        counts: How many rows each of the S steps runs, the first so many of ``order``; they never rise.
        documents: Where the documents are among the rows in this order; on the CPU.
    """

    order: Tensor
    counts: tuple[int, ...]
    documents: DocumentLayout

    @classmethod
    def needed(cls, supervised: Tensor, documents: DocumentLayout) -> Self:
        """Find the fewest rows that a chain has to run.

        Args:
            supervised: Which rows count at each step, bool [S, N], on the CPU.
            documents: Where the documents are.
        """
        steps = torch.arange(len(supervised))[:, None]
        # Row t runs steps 0 .. j, where j is the last step that it is supervised at.
        depth = ((steps + 1) * supervised).amax(0)
        # Where nothing counts, one row runs all the same: weights without a gradient hold up other processes.
        counts = (depth > steps).sum(1).clamp(min=1).tolist()
        order = depth.argsort(descending=True, stable=True)
        return cls(order, tuple(counts), documents.reordered(order))

    @classmethod
    def all(cls, steps: int, rows: int, documents: DocumentLayout) -> Self:
        """Run every row at every step.

        Args:
            steps: Number S of steps.
            rows: Number N of rows.
            documents: Where the documents are.
        """
        order = torch.arange(rows)
        return cls(order, (rows,) * steps, documents.reordered(order))

    def to(self, device: torch.device) -> Self:
        """Return the same rows with ``order`` on a device, to index its tensors with; call it on the CPU's rows."""
        return replace(self, order=moved(self.order, device))

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
