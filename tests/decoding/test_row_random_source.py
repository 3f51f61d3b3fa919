"""One seed per sequence: its draws do not depend on the rest of the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.decoding.loop import Decoder
from specforge.proposals import PromptLookupTokenProposalConfig
from specforge.sampling import RowRandomSource, Sampling

CPU = torch.device("cpu")


def answers(decoder: Decoder, prompts: list[torch.Tensor], seeds: list[int]) -> list[list[int]]:
    output: list[list[int]] = [[] for _ in prompts]
    for emission in decoder.decode(prompts, 12, seeds):
        output[emission.sequence] += emission.tokens
    return output


def test_draws_have_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = RowRandomSource(range(20_000), 1, CPU).categorical(p.expand(20_000, 5))
    counts = drawn.bincount(minlength=5)
    assert counts[1] == counts[4] == 0
    assert torch.allclose(counts / 20_000, p, atol=0.02)


def test_draws_of_a_row_differ():
    rng = RowRandomSource([1, 2], 50, CPU)
    drawn = torch.stack([rng.categorical(torch.full((2, 1, 1000), 1e-3)).flatten() for _ in range(50)])
    assert len(drawn[:, 0].unique()) > 40 and not torch.equal(drawn[:, 0], drawn[:, 1])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
def test_kept_rows_continue_with_their_own_draws(kept):
    p = torch.full((6, 1000), 1e-3)
    all_rows, some = RowRandomSource(range(6), 3, CPU), RowRandomSource(range(6), 3, CPU)
    all_rows.categorical(p), some.categorical(p)
    rows = torch.tensor(kept)
    some.keep_rows(rows)
    assert torch.equal(some.categorical(p[rows]), all_rows.categorical(p)[rows])


def test_a_text_does_not_depend_on_the_batch(verifier_named):
    decoder = Decoder(verifier_named("llama"), sampling=Sampling(temperature=1.0), stop_tokens=[7, 8, 9])
    prompts = [torch.arange(3, 5 + number % 4) for number in range(8)]
    together = answers(decoder, prompts, list(range(8)))
    separate = [answers(decoder, [prompt], [seed])[0] for seed, prompt in enumerate(prompts)]
    assert together == separate and len({len(text) for text in together}) > 1
    assert answers(decoder, prompts, list(range(1, 9))) != together


def test_seeds_per_prompt_need_decoding_without_proposals(verifier_named):
    decoder = Decoder(verifier_named("llama"), proposal=PromptLookupTokenProposalConfig(speculative_tokens=2))
    with pytest.raises(ValueError, match="a seed for each prompt"):
        next(decoder.decode([torch.tensor([3])], 2, [1]))
