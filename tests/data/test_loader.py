from __future__ import annotations

import math
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from specforge.data.loader import PackedSampler, ResumableLoader
from specforge.errors import UsageError


class Numbers(Dataset[dict[str, Tensor]]):
    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor([index])}


def loader(number: int = 11, workers: int = 0, batch_size: int = 2, seed: int = 3, **ranks: int) -> ResumableLoader:
    items = Numbers(number)
    sampler = PackedSampler(items, shuffle=True, seed=seed, **({"rank": 0, "world_size": 1} | ranks))
    return ResumableLoader(items, batch_size=batch_size, sampler=sampler, num_workers=workers)


def loader_state(epoch: int, items: int, stride: int, of: int, seed: int = 3) -> dict[str, int]:
    return {"epoch": epoch, "items": items, "stride": stride, "of": of, "seed": seed}


def indices(batches: Any) -> list[list[int]]:
    return [batch["index"].flatten().tolist() for batch in batches]


@given(number=st.integers(1, 30), world_size=st.integers(1, 7), epoch=st.integers(0, 3))
def test_ranks_train_on_every_item_and_have_equal_lengths(number: int, world_size: int, epoch: int) -> None:
    seen = []
    for rank in range(world_size):
        sampler = PackedSampler(Numbers(number), shuffle=True, seed=3, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        assert len(sampler) == len(seen[rank]) == -(-number // world_size)
    assert {index for items in seen for index in items} == set(range(number))


@given(number=st.integers(1, 30), world_size=st.integers(1, 7))
def test_ranks_evaluate_every_item_once(number: int, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        sampler = PackedSampler(Numbers(number), shuffle=False, seed=3, rank=rank, world_size=world_size)
        seen.append(list(sampler))
        assert len(seen[rank]) == len(sampler)
    assert sorted(index for items in seen for index in items if index >= 0) == list(range(number))
    assert all(-1 - index in range(number) for items in seen for index in items if index < 0)


def test_epochs_are_shuffled_differently_and_repeatably() -> None:
    first, again = loader(), loader()
    for epoch in range(2):
        first.sampler.set_epoch(epoch)
        again.sampler.set_epoch(epoch)
        assert indices(first) == indices(again)
    again.sampler.set_epoch(0)
    assert indices(first) != indices(again)
    assert len(first) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_equals_the_rest_of_an_uninterrupted_one(workers: int) -> None:
    full, stopped, resumed = loader(), loader(workers=workers), loader(workers=workers)
    for each in (full, stopped):
        each.sampler.set_epoch(1)
    first = indices(islice(stopped, 2))
    state = stopped.state_dict()
    assert state == loader_state(1, 4, 2, of=11)
    resumed.load_state_dict(state)
    rest = indices(resumed)
    assert first + rest == indices(full)
    assert resumed.state_dict() == loader_state(1, 11, 2, of=11)
    assert len(resumed) == 6
    for each in (full, resumed):
        each.sampler.set_epoch(2)
    assert indices(resumed) == indices(full)


@given(batches=st.integers(0, 6))
def test_an_epoch_can_be_resumed_after_any_batch(batches: int) -> None:
    resumed = loader(rank=1, world_size=2, number=24)
    resumed.load_state_dict(loader_state(4, 4 * batches, 4, of=24))
    full = loader(rank=1, world_size=2, number=24)
    full.sampler.set_epoch(4)
    assert indices(resumed) == indices(full)[batches:]


def test_the_state_of_a_finished_epoch_starts_the_next_from_its_beginning() -> None:
    finished, resumed, full = loader(), loader(), loader()
    list(finished)
    resumed.load_state_dict(finished.state_dict())
    for each in (resumed, full):
        each.sampler.set_epoch(1)
    assert indices(resumed) == indices(full)


@given(
    number=st.integers(1, 40),
    ranks=st.sampled_from([(1, 4), (2, 2), (4, 1)]),
    other=st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]),
    data=st.data(),
)
def test_another_number_of_ranks_resumes_with_the_remaining_items(
    number: int, ranks: tuple[int, int], other: tuple[int, int], data: st.DataObject
) -> None:
    batches = data.draw(st.integers(0, math.ceil(number / 4)))
    seen, states = [], []
    for rank in range(ranks[0]):
        stopped = loader(number, rank=rank, world_size=ranks[0], batch_size=ranks[1])
        stopped.sampler.set_epoch(2)
        seen += [index for batch in indices(islice(stopped, batches)) for index in batch]
        states.append(stopped.state_dict())
    if batches == 0:  # nothing has been read, so no rank knows the epoch yet
        states = [state | {"epoch": 2} for state in states]
    assert all(state == states[0] for state in states)
    for rank in range(other[0]):
        resumed = loader(number, rank=rank, world_size=other[0], batch_size=other[1])
        resumed.load_state_dict(states[0])
        rest = indices(resumed)
        seen += [index for batch in rest for index in batch]
        assert resumed.batches_before(states[0]) + len(rest) == len(resumed)
    # The items that fill the last batches, at most one per rank, come twice.
    assert set(seen) == set(range(number)) and len(seen) < number + ranks[0] + other[0]
    if number % 4 == 0:
        assert sorted(seen) == list(range(number))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (loader_state(1, 4, 2, of=12), "written after 4 of 12 .* now there are 11"),
        (loader_state(1, 4, 2, of=11, seed=4), "the order of data.seed 4; .* data.seed is 3"),
        (loader_state(1, 3, 3, of=11), "written after 3 of 11 .* not a multiple of 2 rows"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loader().load_state_dict(state)


def test_after_a_whole_epoch_any_settings_are_accepted() -> None:
    resumed = loader(batch_size=3, seed=9)
    resumed.load_state_dict(loader_state(1, 24, 2, of=24))
    resumed.sampler.set_epoch(2)
    assert sorted(index for batch in indices(resumed) for index in batch) == list(range(11))
