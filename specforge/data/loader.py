"""A data loader that resumes in the middle of an epoch."""

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
    """Yields the items of one rank in the order of the epoch.

    Every rank gets the same number of items. Missing items, at most one per rank, are filled: in training with items
    from the start of the epoch (seen twice; none is left out), in evaluation with negative indices, for which
    ``PackedRows`` returns an item without supervision.

    As a ``DistributedSampler`` it keeps Lightning from replacing the loader.

    Args:
        items: The data set.
        shuffle: True shuffles with ``seed`` and the epoch, for training; False keeps the order, for evaluation.
        seed: Seed of the shuffling, the same on every rank.
        rank: Index of this process among the processes that read different data.
        world_size: Number of those processes.
    """

    def __init__(self, items: Dataset[Any], *, shuffle: bool, seed: int, rank: int, world_size: int) -> None:
        super().__init__(items, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.number = len(items)  # type: ignore[arg-type]
        self.skip = 0
        """Number of items, over all ranks, to skip in the next iteration."""

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's items of the epoch, except the skipped ones."""
        items = self._shuffled() if self.shuffle else self._padded()
        left = math.ceil((self.number - self.skip) / self.num_replicas)
        return islice(cycle(items), self.skip + self.rank, self.skip + left * self.num_replicas, self.num_replicas)

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.number, generator=generator).tolist()

    def _padded(self) -> list[int]:
        items = torch.arange(self.total_size)
        return torch.where(items < self.number, items, -1 - items % self.number).tolist()


class ResumableLoader(DataLoader[Batch]):
    """A loader for a ``PackedSampler`` that stores its progress within the epoch.

    Lightning stores ``state_dict`` in each checkpoint and loads it before the first batch. Training then resumes with
    exactly the remaining items, even if the number of ranks or the batch size has changed. Finished items are not
    read: the sampler starts after them.
    """

    sampler: PackedSampler
    batch_size: int
    transform: Callable[[Iterator[Batch], int, int], Iterator[Batch]] | None = None
    """Transforms an epoch's batches one by one; called with the batches, the epoch and the index of the first batch."""
    window_end: Callable[[int], int] | None = None
    """Maps the index of a batch to that of the first batch after its optimizer step. If a step accumulates several
    batches, each holds the masks of all of them (see ``window_of``)."""
    seconds_waited = 0.0
    """Seconds that the consumer has waited for batches, over all epochs."""
    _epoch = 0
    _yielded = 0
    _resumed: tuple[int, int] | None = None

    @property
    def stride(self) -> int:
        """Items per step of all ranks, with one batch each."""
        return self.batch_size * self.sampler.num_replicas

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches of the sampler's epoch, or its remainder after a resume.

        Everything runs at the first ``next``: Lightning calls ``iter`` before it sets the sampler's epoch.
        """
        self._yielded = 0
        if isinstance(self.sampler, PackedSampler):  # Lightning's overfit_batches replaces the sampler
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
        """Read all batches of an optimizer step ahead, so that each can hold the masks of all."""
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
                raise _without_traceback(error) from None
            self.seconds_waited += time.perf_counter() - since
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of items yielded, and what determines their order."""
        if not isinstance(self.sampler, PackedSampler):
            return {}
        return {
            "epoch": self._epoch,
            "items": min(self._yielded * self.stride, self.sampler.number),
            "stride": self.stride,
            "of": self.sampler.number,
            "seed": int(self.sampler.seed),  # jsonargparse's bounded number types are not allowed in safe checkpoints
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume the epoch of ``state`` after its items; another epoch (``set_epoch``) starts from its beginning.

        Raises:
            UsageError: The state is in the middle of an epoch with other items, another order, or at an item where
                no batch of this loader begins.
        """
        if state and isinstance(self.sampler, PackedSampler):
            self.sampler.set_epoch(state["epoch"])
            self._resumed = state["epoch"], self.batches_before(state)

    def batches_before(self, state: dict[str, int]) -> int:
        """Return the number of batches of this loader that hold the items yielded before ``state``."""
        items, number = state["items"], self.sampler.number
        if items == state["of"]:
            return math.ceil(number / self.stride)
        where = f"the checkpoint was written after {items:,} of {state['of']:,} (packed) rows of an epoch"
        if (number, self.sampler.seed) != (state["of"], state["seed"]):
            raise UsageError(
                f"{where}, in the order of data.seed {state['seed']}; now there are {number:,}, and data.seed is "
                f"{self.sampler.seed}. Resume with the same data settings, or start from the draft with model.init_from"
            )
        if items % self.stride:
            raise UsageError(
                f"{where}, which is not a multiple of {self.stride:,} rows a step (data.batch_size times processes); "
                "choose data.batch_size so that it is"
            )
        return items // self.stride


def _without_traceback(error: SpecforgeError) -> SpecforgeError:
    """Return a worker's error with its own message only; torch puts the worker's traceback before it."""
    return type(error)(str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip())
