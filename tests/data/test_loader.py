from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from specforge.data.loader import PackedSampler, ResumableLoader


class Numbers(Dataset[dict[str, Tensor]]):
    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor([index])}


def loader(number: int = 11, workers: int = 0, **ranks: int) -> ResumableLoader:
    items = Numbers(number)
    sampler = PackedSampler(items, shuffle=True, seed=3, **({"rank": 0, "world_size": 1} | ranks))
    return ResumableLoader(items, batch_size=2, sampler=sampler, num_workers=workers)


def indices(batches: Any) -> list[list[int]]:
    return [batch["index"].flatten().tolist() for batch in batches]


@given(number=st.integers(1, 30), world_size=st.integers(1, 7), epoch=st.integers(0, 3))
def test_ranks_train_on_every_item_and_equally_long(number: int, world_size: int, epoch: int) -> None:
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
    whole, stopped, resumed = loader(), loader(workers=workers), loader(workers=workers)
    for each in (whole, stopped):
        each.sampler.set_epoch(1)
    begun = indices(islice(stopped, 2))
    state = stopped.state_dict()
    assert state == {"epoch": 1, "batches": 2}
    resumed.load_state_dict(state)
    rest = indices(resumed)
    assert begun + rest == indices(whole)
    assert resumed.state_dict() == {"epoch": 1, "batches": 6}
    assert len(resumed) == 6
    for each in (whole, resumed):
        each.sampler.set_epoch(2)
    assert indices(resumed) == indices(whole)


@given(batches=st.integers(0, 6))
def test_any_place_of_an_epoch_can_be_resumed_and_only_what_is_left_is_read(batches: int) -> None:
    resumed = loader(rank=1, world_size=2, number=24)
    resumed.load_state_dict({"epoch": 4, "batches": batches})
    whole = loader(rank=1, world_size=2, number=24)
    whole.sampler.set_epoch(4)
    assert indices(resumed) == indices(whole)[batches:]


def test_the_state_of_a_finished_epoch_starts_the_next_from_its_beginning() -> None:
    finished, resumed, whole = loader(), loader(), loader()
    list(finished)
    resumed.load_state_dict(finished.state_dict())
    for each in (resumed, whole):
        each.sampler.set_epoch(1)
    assert indices(resumed) == indices(whole)
