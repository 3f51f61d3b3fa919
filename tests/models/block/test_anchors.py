"""Anchors are drawn per document, with equal frequency, and reproducibly from a seed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specforge.models.block.anchors import draw_anchors
from specforge.models.block.documents import document_starts

DOCUMENTS = torch.tensor([[0] * 7 + [1] * 3 + [-1] * 2, [0] * 12])
CANDIDATES = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0], [1] * 12], dtype=torch.bool)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    quota=st.integers(1, 6),
    seed=st.integers(0, 2**64),
    data=st.data(),
)
def test_each_document_gives_its_quota_or_all_its_candidates(
    lengths: list[int], quota: int, seed: int, data: st.DataObject
) -> None:
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    flags = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    candidates = torch.tensor(flags)[None]
    drawn = draw_anchors(candidates, documents, quota, seed)
    assert not bool((drawn & ~candidates).any())
    for number in range(len(lengths)):
        own = documents == number
        assert int(drawn[own].sum()) == min(quota, int(candidates[own].sum()))


def test_candidates_are_drawn_equally_often_and_differently_each_time() -> None:
    draws = torch.stack([draw_anchors(CANDIDATES, DOCUMENTS, 2, seed) for seed in range(2000)])
    shares = draws.float().mean(0)
    torch.testing.assert_close(shares[0, :7], CANDIDATES[0, :7] * (2 / 6), atol=0.05, rtol=0)
    torch.testing.assert_close(shares[1], torch.full((12,), 2 / 12), atol=0.05, rtol=0)
    # Pairs are drawn independently as well.
    both = (draws[:, 1, 0] & draws[:, 1, 1]).double().mean()
    assert abs(float(both) - 1 / 66) < 0.01


def test_a_draw_does_not_depend_on_the_other_documents() -> None:
    together = draw_anchors(CANDIDATES, DOCUMENTS, 3, seed=7)
    assert torch.equal(together, draw_anchors(CANDIDATES, DOCUMENTS, 3, seed=7))

    def separate(row: int, part: slice) -> Tensor:
        return draw_anchors(CANDIDATES[row : row + 1, part], DOCUMENTS[row : row + 1, part], 3, seed=7)[0]

    assert torch.equal(together[0, :7], separate(0, slice(0, 7)))
    assert torch.equal(together[0, 7:10], separate(0, slice(7, 10)))
    assert torch.equal(together[1], separate(1, slice(None)))


def test_a_document_starts_with_a_new_number_or_row() -> None:
    assert document_starts(DOCUMENTS).tolist() == [0] * 7 + [7] * 3 + [10] * 2 + [12] * 12
