"""Where the documents of a packed batch begin."""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(document_ids: Tensor) -> Tensor:
    """Return the index of the first row of each row's document, int64 [B * T].

    Args:
        document_ids: Which document a row belongs to, [B, T]; equal neighbours belong together, padding too.
    """
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    begins = begins.flatten()
    rows = torch.arange(len(begins), device=begins.device)
    return torch.where(begins, rows, 0).cummax(0).values
