"""What a training step's sums of losses are divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from specforge.moving import moved
from specforge.training.totals import begin_total, total

Kind = Literal["valid", "all"]


class Denominator:
    """Counts the pairs of row and step over all processes and all batches of an optimizer step.

    So the mean loss equals that of a single process with all these rows in one batch.

    Args:
        kind: Whether supervised positions count (valid), or all positions of the batch (all).
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.window: Tensor | None = None
        """Which positions count in all batches of the optimizer step, bool [S, M]; None if it has only one batch."""
        self._begun: Callable[[], Tensor] | None = None

    def begin(self, supervised: Tensor, device: torch.device) -> None:
        """Start to count over the processes, while this one runs the draft.

        Args:
            supervised: Which positions of the batch count, bool [S, N], on the CPU.
            device: Where the counts are needed.
        """
        self._begun = begin_total(self._own(supervised, device))

    def counts(self, supervised: Tensor, device: torch.device) -> Tensor:
        """Return the counts of each step, [S]; of the batch that was begun, if one was.

        Args:
            supervised: As for ``begin``.
            device: As for ``begin``.
        """
        begun, self._begun = self._begun, None
        return begun() if begun else total(self._own(supervised, device))

    def _own(self, supervised: Tensor, device: torch.device) -> Tensor:
        """Return this process's counts."""
        counted = supervised if self.window is None else self.window
        counts = counted.sum(1) if self.kind == "valid" else torch.full((len(counted),), counted.shape[1])
        return moved(counts, device)
