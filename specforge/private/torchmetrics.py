"""Private names of torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torchmetrics import Metric


class UncastMetric(Metric):
    """A metric whose states keep their dtype if a module is cast; they are only moved."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Metric:
        # torch and torchmetrics use this method both to cast and to move states.
        def move(state: Tensor) -> Tensor:
            return state.to(fn(state).device)

        super()._apply(move, exclude_state)
        return self
