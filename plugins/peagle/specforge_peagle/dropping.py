"""Conditional drop of tokens (COD, https://arxiv.org/abs/2602.01469): deeper predictions are trained at fewer rows.

The rows of a depth are among those of the depth before, since a row attends to its own keys of all earlier depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.models.block.anchors import draw_anchors
from specforge.models.block.documents import document_starts


def keep_some(supervised: Tensor, document_ids: Tensor, ratio: float, floor: float, seed: int) -> Tensor:
    """Choose the rows that each depth trains.

    Of a document's n rows that are supervised at depth 0, depth k trains ``max(ratio ** k, floor) * n``, rounded up,
    drawn from the rows that depth k - 1 trains and that are supervised at depth k.

    Args:
        supervised: Rows that can be trained at each depth, bool [K, B, T]; those of a depth are among those before.
        document_ids: Which document a row belongs to, -1 for padding, [B, T].
        ratio: Share of the rows of a depth that the next one trains.
        floor: Least share of the rows of depth 0 that a depth trains.
        seed: The same seed chooses the same rows.

    Returns:
        The rows that are trained, bool [K, B, T].
    """
    starts = document_starts(document_ids)
    number = (
        torch.zeros_like(starts).index_add_(0, starts, supervised[0].flatten().long())[starts].view_as(document_ids)
    )
    kept = [supervised[0]]
    for depth in range(1, len(supervised)):
        quota = (max(ratio**depth, floor) * number).ceil().long()
        kept.append(draw_anchors(kept[-1] & supervised[depth], document_ids, quota, seed + depth))
    return torch.stack(kept)
