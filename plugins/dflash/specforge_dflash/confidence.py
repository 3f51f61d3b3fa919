"""DSpark's confidence: how probable it is that a drafted token is accepted once all before it are."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class Confidence(nn.Module):
    """Log-odds of acceptance, from a slot's state and, where it has one, the embedding of the token before.

    Args:
        width: Width of both together.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return log-odds [...] from inputs [..., width]."""
        return cast(Tensor, self.proj(torch.cat(inputs, dim=-1)).squeeze(-1))
