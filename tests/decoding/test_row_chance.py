"""A seed for each sequence: what is drawn for it is the same in any company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.decoding.loop import Decoder
from specforge.proposals import PromptLookupTokenProposalConfig
from specforge.sampling import RowChance, Sampling

CPU = torch.device("cpu")


def answers(decoder: Decoder, prompts: list[torch.Tensor], seeds: list[int]) -> list[list[int]]:
    said: list[list[int]] = [[] for _ in prompts]
    for emission in decoder.decode(prompts, 12, seeds):
        said[emission.sequence] += emission.tokens
    return said


def test_draws_have_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = RowChance(range(20_000), 1, CPU).draw(p.expand(20_000, 5))
    counts = drawn.bincount(minlength=5)
    assert counts[1] == counts[4] == 0
    assert torch.allclose(counts / 20_000, p, atol=0.02)


def test_draws_of_a_row_differ():
    chance = RowChance([1, 2], 50, CPU)
    drawn = torch.stack([chance.draw(torch.full((2, 1, 1000), 1e-3)).flatten() for _ in range(50)])
    assert len(drawn[:, 0].unique()) > 40 and not torch.equal(drawn[:, 0], drawn[:, 1])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
def test_rows_that_are_left_go_on_with_their_own_draws(kept):
    p = torch.full((6, 1000), 1e-3)
    whole, some = RowChance(range(6), 3, CPU), RowChance(range(6), 3, CPU)
    whole.draw(p), some.draw(p)
    rows = torch.tensor(kept)
    some.select(rows)
    assert torch.equal(some.draw(p[rows]), whole.draw(p)[rows])


def test_a_text_does_not_hang_on_those_beside_it(verifier_named):
    decoder = Decoder(verifier_named("llama"), sampling=Sampling(temperature=1.0), stop_tokens=[7, 8, 9])
    prompts = [torch.arange(3, 5 + number % 4) for number in range(8)]
    together = answers(decoder, prompts, list(range(8)))
    alone = [answers(decoder, [prompt], [seed])[0] for seed, prompt in enumerate(prompts)]
    assert together == alone and len({len(text) for text in together}) > 1
    assert answers(decoder, prompts, list(range(1, 9))) != together


def test_only_where_nothing_is_proposed(verifier_named):
    decoder = Decoder(verifier_named("llama"), proposal=PromptLookupTokenProposalConfig(speculative_tokens=2))
    with pytest.raises(ValueError, match="a seed for each prompt"):
        next(decoder.decode([torch.tensor([3])], 2, [1]))
