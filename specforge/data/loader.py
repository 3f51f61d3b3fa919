"""A data loader that goes on where a checkpoint left it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

Batch = dict[str, Tensor]


class PackedSampler(DistributedSampler[int]):
    """The items of one rank, in the order of the epoch.

    Every rank gets as many items. What is missing to that, at most one item a rank, is filled in training with items
    from the start of the epoch (they are seen twice, none is left out), and in evaluation with negative indices, which
    `PackedRows` answers with an item that supervises nothing.

    Being a `DistributedSampler` tells Lightning to leave the loader as it is.

    Args:
        items: the data set.
        shuffle: True for training, which shuffles with `seed` and the epoch; False for evaluation, in order.
        seed: start of the shuffling, the same on every rank.
        rank: number of this process among those that take different data.
        world_size: number of those processes.
    """

    def __init__(self, items: Dataset[Any], *, shuffle: bool, seed: int, rank: int, world_size: int) -> None:
        super().__init__(items, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.skip = 0
        """Items of this rank to pass over in the next iteration."""

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's items of the epoch, without the skipped ones."""
        items = super().__iter__() if self.shuffle else self._evaluation_items()
        return islice(items, self.skip, None)

    def _evaluation_items(self) -> Iterator[int]:
        items = torch.arange(self.total_size)
        number = len(self.dataset)  # type: ignore[arg-type]
        return iter(torch.where(items < number, items, -1 - items % number)[self.rank :: self.num_replicas].tolist())


class ResumableLoader(DataLoader[Batch]):
    """A loader of a `PackedSampler` whose state says how far the epoch has come.

    Lightning stores `state_dict` in each checkpoint and hands it back before the first batch, so that training goes on
    with exactly the batches that are left. They are not read and thrown away: the sampler starts behind them.
    """

    sampler: PackedSampler
    batch_size: int
    transform: Callable[[Iterator[Batch], int, int], Iterator[Batch]] | None = None
    """Makes an epoch's batches into others, one for one; called with them, the epoch, and the number of the first."""
    _epoch = 0
    _yielded = 0
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches of the sampler's epoch, or what was left of it when the state was stored.

        All of this runs at the first `next`: Lightning calls `iter` before it tells the sampler its epoch.
        """
        if not isinstance(self.sampler, PackedSampler):  # Lightning's overfit_batches puts its own there
            yield from super().__iter__()
            return
        resumed, self._resumed = self._resumed, None
        self._epoch = self.sampler.epoch
        self._yielded = resumed["batches"] if resumed and resumed["epoch"] == self._epoch else 0
        self.sampler.skip = self._yielded * self.batch_size
        batches = super().__iter__()
        for batch in batches if self.transform is None else self.transform(batches, self._epoch, self._yielded):
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were handed out."""
        return {"epoch": self._epoch, "batches": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on in the epoch of `state`, after its batches; another epoch (`set_epoch`) starts from its beginning."""
        self.sampler.set_epoch(state["epoch"])
        self._resumed = state
