"""Tokens at the pairs of row and step that a batch runs."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.models.draft_rows import DraftRows


def tokens_before(input_ids: Tensor, rows: DraftRows) -> Tensor:
    """Return the token before the one that each pair predicts, int64 [P]: x_{t+1+k} at row t and step k.

    Args:
        input_ids: The verifier's tokens x, [B, T].
        rows: The rows that each step runs.
    """
    tokens = input_ids.flatten()
    # What is read past the end of a batch belongs to no supervised pair.
    ahead = [rows.order[:count] + 1 + step for step, count in enumerate(rows.counts)]
    return tokens[torch.cat(ahead).clamp(max=len(tokens) - 1)]
