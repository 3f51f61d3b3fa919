"""The rows of a step of training-time test, as queries in their documents; indices, computed on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from specforge.documents import DocumentLayout, Groups


@dataclass(frozen=True)
class Queries:
    """The first rows, as queries in their documents.

    Attributes:
        groups: The queries' slots.
        positions: For each group, the key index of each slot, int64 [G, Q].
        reach: For each group and each slot, the number of keys up to the last query of the slots so far.
    """

    groups: Groups
    positions: tuple[Tensor, ...]
    reach: tuple[Sequence[int], ...]

    @classmethod
    def packed(cls, documents: DocumentLayout, count: int) -> Self:
        """Place the first ``count`` rows in consecutive slots."""
        found = [_packed(group, count) for group in documents.groups]
        reach = tuple((one.cummax(1).values.amax(0) + 1).tolist() if len(one) else [] for _, one in found)
        return cls(Groups.of([indices for indices, _ in found]), tuple(positions for _, positions in found), reach)


def _packed(group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return which of the first ``count`` rows are in each document of a group, and their positions, [G, Q] each."""
    document, position = ((group >= 0) & (group < count)).nonzero(as_tuple=True)
    counts = document.bincount(minlength=len(group))
    slot = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    shape = len(group), int(counts.max()) if len(document) else 0
    indices, positions = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    indices[document, slot], positions[document, slot] = group[document, position], position
    return indices, positions
