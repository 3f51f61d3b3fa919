"""The slots of blocks that a batch runs, and those whose states are wanted.

Row t drafts from anchor t + 1, the token that its block begins with. Slot k of the block has the position of
token t + 1 + k. Step s of ``specforge.models.chain.alignment`` is slot s if the anchor's own slot predicts, and slot
s + 1 otherwise: in both cases it is compared with the verifier's state of row t + 1 + s.

Letters in shapes: A blocks, K slots a block, S steps, P pairs of row and step, Q slots that are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from specforge.models.draft_rows import DraftRows


@dataclass(frozen=True)
class BlockSlots:
    """Blocks in the order of their rows; their slots are numbered through, K for each block. All is on the CPU.

    Attributes:
        rows: Row t of each block, ascending, int64 [A].
        size: Number K of slots a block.
        wanted: Slots whose states are wanted, ascending, int64 [Q].
        of_pairs: Index within ``wanted`` of each pair, one step after the other, int64 [P].
    """

    rows: Tensor
    size: int
    wanted: Tensor
    of_pairs: Tensor

    @classmethod
    def of(cls, rows: DraftRows, size: int, first: int, begin: int) -> Self:
        """Find the slots that rows and steps are computed in.

        Args:
            rows: The rows that each step runs.
            size: Number K of slots a block.
            first: The slot of step 0.
            begin: The first slot of each block that is wanted, ``first`` or one before it.
        """
        ascending, order = rows.host_order[: rows.counts[0]].sort()
        block = order.argsort()
        pairs = torch.cat([block[:count] * size + first + step for step, count in enumerate(rows.counts)])
        before = torch.arange(begin, first)
        others = (torch.arange(len(ascending))[:, None] * size + before).flatten()
        wanted, permutation = torch.cat([pairs, others]).sort()
        return cls(ascending, size, wanted, permutation.argsort()[: len(pairs)])

    def parts(self, number: int) -> list[Self]:
        """Split the blocks, so many at a time; ``of_pairs`` of a part is that of its wanted slots in their order."""
        if len(self.rows) <= number:
            return [self]
        bounds = torch.arange(0, len(self.rows) + number, number) * self.size
        ends = torch.searchsorted(self.wanted, bounds).tolist()
        cls = type(self)
        found = []
        for index, (begin, end) in enumerate(pairwise(ends)):
            wanted = self.wanted[begin:end] - index * number * self.size
            own = torch.arange(end - begin)
            found.append(cls(self.rows[index * number : (index + 1) * number], self.size, wanted, own))
        return found
