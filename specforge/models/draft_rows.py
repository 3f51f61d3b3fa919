"""The rows that each step of a chain runs: those supervised at this step or at a later one, which reads its states.

Rows are ordered so that the rows of every step come first; a step's input is then a view of the previous step's states.
All other rows are only attended to: step 0 computes their keys and values.

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
        order: All rows, int64 [N], by the number of steps that run them, descending.
        counts: Number of rows that each of the S steps runs, the first ones of ``order``; never increasing.
        documents: The documents of the rows in this order, on the CPU.
        host_order: ``order`` on the CPU, for indices that are computed there.
    """

    order: Tensor
    counts: tuple[int, ...]
    documents: DocumentLayout
    host_order: Tensor

    @classmethod
    def needed(cls, supervised: Tensor, documents: DocumentLayout) -> Self:
        """Return the minimal rows that a chain must run.

        Args:
            supervised: Which rows count at each step, bool [S, N], on the CPU.
            documents: The documents of the batch.
        """
        steps = torch.arange(len(supervised))[:, None]
        # Row t runs steps 0 .. j, where j is its last supervised step.
        depth = ((steps + 1) * supervised).amax(0)
        # If nothing counts, one row still runs: other processes would wait for the missing gradients.
        counts = (depth > steps).sum(1).clamp(min=1).tolist()
        order = depth.argsort(descending=True, stable=True)
        return cls(order, tuple(counts), documents.reordered(order), order)

    @classmethod
    def all(cls, steps: int, rows: int, documents: DocumentLayout) -> Self:
        """Run every row at every step.

        Args:
            steps: Number S of steps.
            rows: Number N of rows.
            documents: The documents of the batch.
        """
        order = torch.arange(rows)
        return cls(order, (rows,) * steps, documents.reordered(order), order)

    def to(self, device: torch.device) -> Self:
        """Return the same rows with ``order`` on a device, to index tensors there; call it with rows on the CPU."""
        return replace(self, order=moved(self.order, device))

    def state_index(self) -> Tensor:
        """Return the index of each row's and step's state among the P states, concatenated step by step.

        Returns:
            Indices, int64 [S, N]; -1 if the row is not run.
        """
        state_index = torch.full((len(self.counts), len(self.order)), -1, device=self.order.device)
        numbers = torch.arange(sum(self.counts), device=self.order.device).split(self.counts)
        for of_step, count, own in zip(state_index, self.counts, numbers, strict=True):
            of_step[self.order[:count]] = own
        return state_index
