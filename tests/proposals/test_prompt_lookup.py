from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.proposals.prompt_lookup import PromptLookupProposer, PromptLookupTokenProposalConfig
from specforge.sampling import RandomSource, Sampling


def looked_up(*sequences: list[int], tokens: int = 5, max_ngram: int = 3, min_ngram: int = 1) -> list[list[int]]:
    config = PromptLookupTokenProposalConfig(speculative_tokens=tokens, max_ngram=max_ngram, min_ngram=min_ngram)
    proposer = PromptLookupProposer(config, Sampling(), RandomSource())
    assert proposer.depth == tokens and not proposer.needs_draft
    proposal = proposer.propose([torch.tensor(sequence) for sequence in sequences], None)
    assert proposal.log_q is None and (proposal.depths == torch.arange(proposal.tokens.shape[1]) + 1).all()
    return [row[:count] for row, count in zip(proposal.tokens.tolist(), proposal.counts.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("text", "options", "copied"),
    [
        ([7], {}, []),
        ([1, 2, 3, 4], {}, []),
        # Copying stops at the end of the text.
        ([1, 2, 3, 9, 1], {}, [2, 3, 9, 1]),
        ([1, 2, 3, 9, 1], {"tokens": 2}, [2, 3]),
        # A match just before the end leaves little to copy.
        ([5, 1, 1], {}, [1]),
        ([2, 2], {}, [2]),
        ([1, 2, 1, 2], {}, [1, 2]),
        ([3, 3, 3, 3, 3], {}, [3]),
        # The longest n-gram decides, wherever it occurs.
        ([1, 2, 3, 8, 9, 3, 7, 1, 2, 3], {}, [8, 9, 3, 7, 1]),
        ([1, 2, 3, 8, 9, 3, 7, 1, 2, 3], {"max_ngram": 1}, [7, 1, 2, 3]),
        ([0, 1, 2, 3, 8, 1, 2, 3, 9, 0, 1, 2, 3], {"max_ngram": 4}, [8, 1, 2, 3, 9]),
        # Of several of the same length, the latest.
        ([1, 2, 5, 1, 2, 6, 1, 2], {}, [6, 1, 2]),
        ([4, 1, 4, 2, 4, 3, 4], {"tokens": 1}, [3]),
        # N-grams below the minimum length do not count.
        ([1, 2, 5, 9, 2], {"min_ngram": 2}, []),
        ([1, 2, 5, 1, 2], {"min_ngram": 2}, [5, 1, 2]),
        ([1, 2], {"min_ngram": 2, "max_ngram": 3}, []),
        ([1, 1], {"min_ngram": 2, "max_ngram": 3}, []),
        # An n-gram longer than the text.
        ([6, 6, 6], {"max_ngram": 99}, [6]),
    ],
)
def test_what_followed_before_is_copied(text: list[int], options: dict[str, int], copied: list[int]) -> None:
    assert looked_up(text, **options) == [copied]


def test_each_sequence_is_looked_up_in_itself() -> None:
    assert looked_up([1, 2, 3, 1], [4, 5], [6, 6], tokens=3) == [[2, 3, 1], [], [6]]


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=14),
    tokens=st.integers(1, 5),
    ngrams=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_the_latest_of_the_longest_is_copied(text: list[int], tokens: int, ngrams: tuple[int, int]) -> None:
    shortest, longest = sorted(ngrams)
    copied: list[int] = []
    for length in range(longest, shortest - 1, -1):
        begins = [begin for begin in range(len(text) - length) if text[begin : begin + length] == text[-length:]]
        if begins and len(text) > length:
            copied = text[begins[-1] + length :][:tokens]
            break
    assert looked_up(text, tokens=tokens, max_ngram=longest, min_ngram=shortest) == [copied]


def test_contradictory_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="min_ngram 4 exceeds max_ngram 3"):
        PromptLookupTokenProposalConfig(min_ngram=4)
    with pytest.raises(ValueError, match="min_ngram"):
        PromptLookupTokenProposalConfig(min_ngram=0)
