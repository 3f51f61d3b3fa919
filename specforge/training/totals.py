"""Sums over the processes of a run, where a mean of their means would be wrong."""

from __future__ import annotations

import torch.distributed
from torch import Tensor


def processes() -> int:
    """Return how many processes train together."""
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if many else 1


def total(values: Tensor) -> Tensor:
    """Add a tensor up over all processes, each of which must call this; in a run of one, return it as it is.

    Args:
        values: Of the same shape in every process; no gradient flows through the sum.
    """
    if processes() == 1:
        return values
    summed = values.detach().clone()
    torch.distributed.all_reduce(summed)
    return summed


def of_first(values: Tensor) -> Tensor:
    """Return the first process's tensor in all processes, each of which must call this with one of that shape."""
    if processes() > 1:
        torch.distributed.broadcast(values, src=0)
    return values
