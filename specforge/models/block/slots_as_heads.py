"""Attention of blocks by a kernel for documents: to it a block is one row, and the block's slots are further heads.

All slots of a block see the same rows of the context, those up to its own row t: a causal kernel runs the K slots of a
block as K times as many heads of row t. The K keys of the block itself are then merged in by log-sum-exp, as those of
training-time test are (``specforge.models.chain.merging``), so that no mask is made, and no key is looked at in vain.

Letters in shapes: N context rows, A blocks, K slots a block, Q slots that attend, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.documents import Groups
from specforge.flash import Ends
from specforge.models.chain.kernels import Sequences
from specforge.models.chain.merging import merged_attention
from specforge.moving import moved


class SlotsAsHeads:
    """Attention of the blocks of a packed batch, without masks.

    Args:
        rows: Row t of each block, ascending, int64 [A], on the CPU.
        starts: First row of each block's document, int64 [A], on the CPU.
        size: Number K of slots a block.
        slots: The slots that attend, ascending, int64 [Q], on the CPU; None for all of them.
        device: Where they attend.
    """

    def __init__(self, rows: Tensor, starts: Tensor, size: int, slots: Tensor | None, device: torch.device) -> None:
        self._shape = len(rows), size
        documents, counts = starts.unique_consecutive(return_counts=True)
        last = rows[counts.cumsum(0) - 1]
        first = rows[counts.cumsum(0) - counts]
        # Queries are a document's rows from its first block to its last one; rows without a block are empty slots.
        asked, of_queries = _ranges(first, last)
        seen, of_keys = _ranges(documents, last)
        block_of = torch.full((int(last[-1]) + 1,), -1)
        block_of[rows] = torch.arange(len(rows))
        kernel = Sequences(Groups.of([block_of[asked][None]]), of_queries, of_keys)
        chosen = None if slots is None else Groups((self._shape,), torch.arange(len(slots)), slots)
        self._kernel, self._context, self._chosen = moved((kernel, Groups.of([seen[None]]), chosen), device)

    def attend(
        self,
        query: Tensor,
        context: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attend in one layer.

        Args:
            query: [Q, heads, D].
            context: Keys and values of the context, [N, key-value heads, D] each.
            own: Those of all slots of all blocks, [A * K, key-value heads, D] each.
            scale: Factor of the logits.
            window: A slot sees only the last so many context rows; None for all.

        Returns:
            [Q, heads, D].
        """
        blocks = query.unflatten(0, self._shape) if self._chosen is None else self._chosen.gather(query)[0]
        # Heads that share a key are neighbours: [A, key-value heads, K, heads that share one, D].
        by_key = blocks.unflatten(2, (own[0].shape[1], -1)).transpose(1, 2)
        keys, values = (self._context.gather(one) for one in context)
        own_keys, own_values = (one.unflatten(0, self._shape).unbind(1) for one in own)
        attended = merged_attention(
            self._kernel, by_key.flatten(1, 3), keys, values, own_keys, own_values, scale, window
        )
        by_slot = attended.view(by_key.shape).transpose(1, 2).flatten(2, 3)
        return by_slot.flatten(0, 1) if self._chosen is None else self._chosen.scatter([by_slot], len(query))


def _ranges(first: Tensor, last: Tensor) -> tuple[Tensor, Ends]:
    """Return the rows from each first to each last one, one range after the other, and the ranges' ends."""
    ranges = [torch.arange(*ends) for ends in zip(first.tolist(), (last + 1).tolist(), strict=True)]
    return torch.cat(ranges), Ends.of(last + 1 - first)
