from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.errors import UsageError
from specforge.models.vocabulary import DraftVocabulary

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=30)


@given(counts=COUNTS, data=st.data())
def test_the_most_frequent_tokens_are_chosen_in_order(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(counts)))
    vocabulary = DraftVocabulary.most_frequent(torch.tensor(counts), size)
    # By descending count, ties by ascending id.
    chosen = sorted(sorted(range(len(counts)), key=lambda token: (-counts[token], token))[:size])
    assert vocabulary.size == size
    assert [index + offset for index, offset in enumerate(vocabulary.d2t.tolist())] == chosen
    assert vocabulary.t2d.tolist() == [token in chosen for token in range(len(counts))]
    assert vocabulary.t2d.dtype == torch.bool and vocabulary.d2t.dtype == torch.int64
    assert vocabulary.coverage(torch.tensor(counts)) == pytest.approx(
        sum(counts[token] for token in chosen) / max(1, sum(counts))
    )


def test_ties_go_to_the_lowest_ids() -> None:
    vocabulary = DraftVocabulary.most_frequent(torch.tensor([0, 7, 1, 1, 7, 1, 0]), 4)
    assert (vocabulary.d2t + torch.arange(4)).tolist() == [1, 2, 3, 4]
    assert vocabulary.d2t.tolist() == [1, 1, 1, 1]
    unseen = DraftVocabulary.most_frequent(torch.tensor([0, 0, 0, 3]), 3)
    assert unseen.t2d.tolist() == [True, True, False, True]
    # Long enough to reveal an unstable sort.
    many = DraftVocabulary.most_frequent(torch.arange(20000) % 2, 15000)
    assert many.t2d[1::2].all() and many.t2d[0:10000:2].all() and not many.t2d[10000::2].any()


@given(mask=st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_two_maps_agree(mask: list[bool]) -> None:
    vocabulary = DraftVocabulary.from_t2d(torch.tensor(mask))
    rebuilt = [False] * len(mask)
    for index, offset in enumerate(vocabulary.d2t.tolist()):
        rebuilt[index + offset] = True
    assert rebuilt == mask


def test_the_full_vocabulary_has_no_offsets() -> None:
    vocabulary = DraftVocabulary.most_frequent(torch.tensor([3, 0, 9]), 3)
    assert vocabulary.t2d.all() and not vocabulary.d2t.any()
    assert vocabulary.coverage(torch.tensor([3, 0, 9])) == 1.0


def test_coverage_counts_over_other_text() -> None:
    vocabulary = DraftVocabulary.from_t2d(torch.tensor([True, False, True]))
    assert vocabulary.coverage(torch.tensor([1, 5, 2])) == pytest.approx(3 / 8)
    assert vocabulary.coverage(torch.zeros(3, dtype=torch.int64)) == 0.0


def test_more_tokens_than_the_verifier_has_are_refused() -> None:
    with pytest.raises(UsageError, match=r"draft_vocab_size 4 exceeds .* 3 tokens"):
        DraftVocabulary.most_frequent(torch.zeros(3, dtype=torch.int64), 4)
