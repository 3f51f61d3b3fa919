"""Sums over the processes of a run, where a mean of their means would be wrong."""

from __future__ import annotations

from collections.abc import Callable

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
    return begin_total(values)()


def begin_total(values: Tensor) -> Callable[[], Tensor]:
    """Begin to add a tensor up over all processes, while this one computes what does not depend on the sum.

    Args:
        values: As for ``total``.

    Returns:
        Waits for the sum, and returns it.
    """
    if processes() == 1:
        return lambda: values
    summed = values.detach().clone()
    work = torch.distributed.all_reduce(summed, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return summed

    return finish


def of_first(values: Tensor) -> Tensor:
    """Return the first process's tensor in all processes, each of which must call this with one of that shape."""
    if processes() > 1:
        torch.distributed.broadcast(values, src=0)
    return values
