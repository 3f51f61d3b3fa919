"""Private names of torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torchmetrics import Metric


class UncastMetric(Metric):
    """A metric whose states keep their type where a module is cast: they are moved only."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Metric:
        # torch and torchmetrics both cast and move states by this.
        def move(state: Tensor) -> Tensor:
            return state.to(fn(state).device)

        super()._apply(move, exclude_state)
        return self
