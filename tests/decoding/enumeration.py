"""All outcomes of a random procedure with their probabilities: ``RandomSource`` replaced by a list of decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from specforge.sampling import RandomSource


class DecidedSource(RandomSource):
    """One run with given decisions; after them the first possible outcome is chosen and the others are recorded.

    Attributes:
        probability: Probability of this run.
        forks: Decisions that lead to the other outcomes possible after the given ones.
    """

    def __init__(self, decisions: list[int]) -> None:
        super().__init__()
        self.decisions = decisions
        self.chosen: list[int] = []
        self.probability = 1.0
        self.forks: list[list[int]] = []

    def _decide(self, probabilities: list[float]) -> int:
        possible = [outcome for outcome, probability in enumerate(probabilities) if probability > 0]
        assert possible, "all probabilities are 0"
        index = len(self.chosen)
        if index < len(self.decisions):
            outcome = self.decisions[index]
        else:
            outcome, *others = possible
            self.forks += [[*self.chosen, other] for other in others]
        self.chosen.append(outcome)
        self.probability *= probabilities[outcome]
        return outcome

    def bernoulli(self, probability: Tensor) -> Tensor:
        chances = probability.double().nan_to_num(0.0).clamp(0, 1).flatten().tolist()
        # Certain outcomes are not decisions.
        return torch.tensor(
            [self._decide([1 - chance, chance]) == 1 if 0 < chance < 1 else chance == 1 for chance in chances]
        ).view_as(probability)

    def categorical(self, probabilities: Tensor) -> Tensor:
        rows = probabilities.double().flatten(0, -2)
        rows = rows / rows.sum(-1, keepdim=True)
        return torch.tensor([self._decide(row) for row in rows.tolist()]).view(probabilities.shape[:-1])

    def draw_without_replacement(self, log_probs: Tensor, number: int) -> Tensor:
        rows = [self._draw_in_turn(row, number) for row in log_probs.double().exp().flatten(0, -2).tolist()]
        return torch.tensor(rows).view(*log_probs.shape[:-1], number)

    def _draw_in_turn(self, weights: list[float], number: int) -> list[int]:
        drawn: list[int] = []
        for _ in range(number):
            left = [0.0 if token in drawn else weight for token, weight in enumerate(weights)]
            if not any(left):
                # Indices of probability 0 come last, in any order.
                left = [0.0 if token in drawn else 1.0 for token in range(len(weights))]
                drawn.append(left.index(1.0))
                continue
            drawn.append(self._decide([weight / sum(left) for weight in left]))
        return drawn


def all_runs(procedure: Callable[[RandomSource], Any]) -> Iterator[tuple[Any, float]]:
    """Yield every possible result of a procedure with its probability."""
    pending, total = [[]], 0.0
    while pending:
        rng = DecidedSource(pending.pop())
        result = procedure(rng)
        pending += rng.forks
        total += rng.probability
        yield result, rng.probability
    assert abs(total - 1) < 1e-9
