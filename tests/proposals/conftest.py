"""A draft whose logits are a function of the complete path, and which records its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from specforge.models.drafter import Drafter
from specforge.verifier.features import Features

Path = tuple[int, ...]


@dataclass
class PathDrafter(Drafter):
    """Drafts after paths of the verifier's tokens.

    Attributes:
        logits_after: Logits [D] after a path of one of the sequences.
        batch_size: Number of sequences.
        draft_ids: The verifier's ids of the draft tokens.
        stepped: Number of nodes of each call of ``step``.
    """

    logits_after: Callable[[int, Path], Tensor]
    batch_size: int = 1
    draft_ids: Tensor | None = None
    stepped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.paths: list[list[Path]] = [[()] for _ in range(self.batch_size)]
        self.root = torch.stack([self.logits_after(row, ()) for row in range(self.batch_size)])

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        raise AssertionError("a proposal method does not commit")

    def select(self, rows: Tensor) -> None:
        raise AssertionError("a proposal method does not select")

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        assert tokens.shape == parents.shape and len(tokens) == self.batch_size
        self.stepped.append(tokens.shape[1])
        logits = []
        for row, (own, own_parents) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
            # The root's path comes before those of the nodes.
            new = [(*self.paths[row][parent + 1], token) for token, parent in zip(own, own_parents, strict=True)]
            self.paths[row] += new
            logits.append(torch.stack([self.logits_after(row, path) for path in new]))
        return torch.stack(logits)


@pytest.fixture
def path_drafter() -> type[PathDrafter]:
    return PathDrafter


@pytest.fixture
def random_logits() -> Callable[..., Callable[[int, Path], Tensor]]:
    """Create logits that are random but fixed after every path."""

    def make(size: int, seed: int = 0, sharpness: float = 2.0) -> Callable[[int, Path], Tensor]:
        def logits_after(row: int, path: Path) -> Tensor:
            generator = torch.Generator().manual_seed(hash((seed, row, path)) % 2**31)
            return sharpness * torch.randn(size, generator=generator, dtype=torch.float64)

        return logits_after

    return make
