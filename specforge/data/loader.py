"""A data loader that goes on where a checkpoint left it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from specforge.data.packing import window_of
from specforge.errors import SpecforgeError, UsageError

Batch = dict[str, Any]


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
        self.number = len(items)  # type: ignore[arg-type]
        self.skip = 0
        """Items of the epoch, over all ranks, to pass over in the next iteration."""

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's items of the epoch, without the skipped ones."""
        items = self._shuffled() if self.shuffle else self._filled_up()
        left = math.ceil((self.number - self.skip) / self.num_replicas)
        return islice(cycle(items), self.skip + self.rank, self.skip + left * self.num_replicas, self.num_replicas)

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.number, generator=generator).tolist()

    def _filled_up(self) -> list[int]:
        items = torch.arange(self.total_size)
        return torch.where(items < self.number, items, -1 - items % self.number).tolist()


class ResumableLoader(DataLoader[Batch]):
    """A loader of a `PackedSampler` whose state says how far the epoch has come.

    Lightning stores `state_dict` in each checkpoint and hands it back before the first batch, so that training goes on
    with exactly the items that are left, also where another number of ranks takes them in batches of another size.
    They are not read and thrown away: the sampler starts behind them.
    """

    sampler: PackedSampler
    batch_size: int
    transform: Callable[[Iterator[Batch], int, int], Iterator[Batch]] | None = None
    """Makes an epoch's batches into others, one for one; called with them, the epoch, and the number of the first."""
    window_end: Callable[[int], int] | None = None
    """Maps the number of a batch to that of the first one after its optimizer step. Where a step takes several
    batches, each holds the masks of all of them (see `window_of`)."""
    seconds_waited = 0.0
    """How long whoever takes the batches has waited until they were read, over all epochs."""
    _epoch = 0
    _yielded = 0
    _resumed: tuple[int, int] | None = None

    @property
    def stride(self) -> int:
        """Items that all ranks together take with one batch each."""
        return self.batch_size * self.sampler.num_replicas

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches of the sampler's epoch, or what was left of it when the state was stored.

        All of this runs at the first `next`: Lightning calls `iter` before it tells the sampler its epoch.
        """
        self._yielded = 0
        if isinstance(self.sampler, PackedSampler):  # Lightning's overfit_batches puts its own there
            resumed, self._resumed = self._resumed, None
            self._epoch = self.sampler.epoch
            self._yielded = resumed[1] if resumed and resumed[0] == self._epoch else 0
            self.sampler.skip = min(self._yielded * self.stride, self.sampler.number)
        batches = self._timed(super().__iter__())
        if self.transform is not None:
            batches = self.transform(batches, self._epoch, self._yielded)
        for batch in batches if self.window_end is None else self._in_windows(batches, self.window_end):
            self._yielded += 1
            yield batch

    def _in_windows(self, batches: Iterator[Batch], end: Callable[[int], int]) -> Iterator[Batch]:
        """Read the batches of an optimizer step ahead, so that each of them knows all."""
        while window := deque(islice(batches, max(end(self._yielded) - self._yielded, 1))):
            masks = window_of(window) if len(window) > 1 else {}
            while window:
                yield window.popleft() | masks

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            since = time.perf_counter()
            try:
                batch = next(batches, None)
            except SpecforgeError as error:
                raise _without_worker(error) from None
            self.seconds_waited += time.perf_counter() - since
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, how many of its items were handed out, and what its order follows from."""
        if not isinstance(self.sampler, PackedSampler):
            return {}
        return {
            "epoch": self._epoch,
            "items": min(self._yielded * self.stride, self.sampler.number),
            "stride": self.stride,
            "of": self.sampler.number,
            "seed": int(self.sampler.seed),  # bounded numbers of the command line are no part of safe checkpoints
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on in the epoch of `state`, after its items; another epoch (`set_epoch`) starts from its beginning.

        Raises:
            UsageError: The state stands in the middle of an epoch of other items, or of another order, or where no
                batch of this loader begins.
        """
        if state and isinstance(self.sampler, PackedSampler):
            self.sampler.set_epoch(state["epoch"])
            self._resumed = state["epoch"], self.batches_before(state)

    def batches_before(self, state: dict[str, int]) -> int:
        """Return how many batches of this loader hold the items that were handed out before `state`."""
        items, number = state["items"], self.sampler.number
        if items == state["of"]:
            return math.ceil(number / self.stride)
        where = f"the checkpoint stands after {items:,} of {state['of']:,} (packed) rows of an epoch"
        if (number, self.sampler.seed) != (state["of"], state["seed"]):
            raise UsageError(
                f"{where}, in the order of data.seed {state['seed']}; there are {number:,} now, and data.seed is "
                f"{self.sampler.seed}. Go on with the same data settings, or start from the draft with model.init_from"
            )
        if items % self.stride:
            raise UsageError(
                f"{where}, which batches of {self.stride:,} (data.batch_size times processes) do not reach; choose "
                "data.batch_size so that they do"
            )
        return items // self.stride


def _without_worker(error: SpecforgeError) -> SpecforgeError:
    """Return an error with the message that it had in the loading process, where torch puts it after a traceback."""
    return type(error)(str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip())
