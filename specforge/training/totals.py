"""Sums over the processes of a run, for means that a mean of means would get wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed
from torch import Tensor


def processes() -> int:
    """Return the number of processes that train together."""
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if many else 1


def total(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, each of which must call this; a single process returns it unchanged.

    Args:
        values: The summand, of the same shape in every process; no gradient flows through the sum.
    """
    return begin_total(values)()


def begin_total(values: Tensor) -> Callable[[], Tensor]:
    """Start to sum a tensor over all processes, while this process computes something else.

    Args:
        values: As for ``total``.

    Returns:
        A function that waits for the sum and returns it.
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
    """Return the first process's tensor in all processes, each of which must call this with the same shape."""
    if processes() > 1:
        torch.distributed.broadcast(values, src=0)
    return values
