"""Anchors: the rows of a batch that a block is drafted from in training, drawn again at each optimizer step.

A draw depends only on its seed and on the index of a row among the candidates of its document. So a resumed run repeats
it, and it does not matter which process, or which batch of an accumulated step, holds a document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.models.block.documents import document_starts

_BITS = 0xFFFFFFFF


def draw_anchors(candidates: Tensor, document_ids: Tensor, quota: int | Tensor, seed: int) -> Tensor:
    """Draw rows of each document at random, without replacement.

    Args:
        candidates: Rows that may be drawn, bool [B, T].
        document_ids: Which document a row belongs to, -1 for padding, [B, T].
        quota: Most rows of a document, or for each row that of its document, [B, T]; all candidates are drawn if there
            are no more.
        seed: The same seed draws the same rows.

    Returns:
        The rows that were drawn, bool [B, T].
    """
    starts, wanted = document_starts(document_ids), candidates.flatten().long()
    before = wanted.cumsum(0) - wanted
    # By document; within each, candidates first, in a random order.
    order = _scrambled(before - before[starts], seed).argsort()
    order = order[wanted[order].argsort(descending=True, stable=True)]
    order = order[starts[order].argsort(stable=True)]
    # A document's rows are as many in this order as in the batch, so they begin at the same index.
    rank = torch.arange(len(order), device=order.device) - starts[order]
    drawn = torch.zeros_like(wanted, dtype=torch.bool)
    drawn[order] = rank < (quota.flatten()[order] if isinstance(quota, Tensor) else quota)
    return drawn.view_as(candidates) & candidates


def _scrambled(numbers: Tensor, seed: int) -> Tensor:
    """Map numbers below 2**32 to others, one to one: the finaliser of MurmurHash3 (Appleby, 2008), on any device."""
    mixed = (numbers + (seed * 0x9E3779B1 & _BITS)) & _BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _BITS
    return mixed ^ (mixed >> 16)
