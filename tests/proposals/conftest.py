"""A draft whose logits are a function of the whole path, and that notes what it was asked."""

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
    """Drafts behind paths of the verifier's tokens.

    Attributes:
        logits_behind: Logits [D] behind a path of one of the sequences.
        batch_size: Number of sequences.
        draft_ids: The verifier's ids of the draft tokens.
        stepped: How many nodes each call of ``step`` brought.
    """

    logits_behind: Callable[[int, Path], Tensor]
    batch_size: int = 1
    draft_ids: Tensor | None = None
    stepped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.paths: list[list[Path]] = [[()] for _ in range(self.batch_size)]
        self.root = torch.stack([self.logits_behind(row, ()) for row in range(self.batch_size)])

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        raise AssertionError("a proposal method does not commit")

    def select(self, rows: Tensor) -> None:
        raise AssertionError("a proposal method does not select")

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        assert tokens.shape == parents.shape and len(tokens) == self.batch_size
        self.stepped.append(tokens.shape[1])
        logits = []
        for row, (own, behind) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
            # The root's path stands before those of the nodes.
            new = [(*self.paths[row][parent + 1], token) for token, parent in zip(own, behind, strict=True)]
            self.paths[row] += new
            logits.append(torch.stack([self.logits_behind(row, path) for path in new]))
        return torch.stack(logits)


@pytest.fixture
def path_drafter() -> type[PathDrafter]:
    return PathDrafter


@pytest.fixture
def random_logits() -> Callable[..., Callable[[int, Path], Tensor]]:
    """Make logits that are random but fixed behind every path."""

    def of(size: int, seed: int = 0, sharpness: float = 2.0) -> Callable[[int, Path], Tensor]:
        def behind(row: int, path: Path) -> Tensor:
            generator = torch.Generator().manual_seed(hash((seed, row, path)) % 2**31)
            return sharpness * torch.randn(size, generator=generator, dtype=torch.float64)

        return behind

    return of
