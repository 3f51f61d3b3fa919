"""Deeper predictions are trained at fewer, nested rows, which the seed determines."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.models.chain.alignment import align
from specforge_peagle.dropping import keep_some


@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=4),
    ratio=st.floats(0, 1),
    floor=st.floats(0, 1),
    seed=st.integers(0, 2**63),
    data=st.data(),
)
def test_a_depth_keeps_its_share_of_the_previous_rows(
    lengths: list[int], ratio: float, floor: float, seed: int, data: st.DataObject
) -> None:
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    flags = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    supervised = align(torch.tensor(flags)[None], documents, 5).supervised
    kept = keep_some(supervised, documents, ratio, floor, seed)
    assert torch.equal(kept[0], supervised[0])
    for number in range(len(lengths)):
        own = documents == number
        rows = int(supervised[0][own].sum())
        for depth in range(1, 5):
            possible = kept[depth - 1] & supervised[depth]
            assert not bool((kept[depth] & ~possible).any())
            size = math.ceil(torch.tensor(max(ratio**depth, floor)) * rows)
            assert int(kept[depth][own].sum()) == min(size, int(possible[own].sum()))


def test_all_rows_are_kept_without_dropping_and_others_with_another_seed() -> None:
    documents = torch.zeros(1, 60, dtype=torch.int64)
    supervised = align(torch.ones(1, 60, dtype=torch.bool), documents, 4).supervised
    assert torch.equal(keep_some(supervised, documents, 1.0, 0.0, 3), supervised)
    first, again, other = (keep_some(supervised, documents, 0.5, 0.0, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
