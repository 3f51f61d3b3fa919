"""Block drafters compute the same logits as the networks in training; decoded text is the verifier's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from block_drafts import AUX_LAYERS, KINDS, MASK, random_draft
from random_verifiers import WIDTH
from torch import Tensor
from transformers import PreTrainedModel

from specforge.config import TokenProposalConfig
from specforge.decoding.loop import Decoder
from specforge.errors import UsageError
from specforge.proposals import (
    DynamicTreeTokenProposalConfig,
    GreedyTokenProposalConfig,
    SamplingTokenProposalConfig,
    StaticTreeTokenProposalConfig,
)
from specforge.sampling import Sampling
from specforge.verifier.features import Features
from specforge_dflash.short_block import ShortBlockTokenProposalConfig

VerifierOf = Callable[[str], PreTrainedModel]
LENGTH = 16
COMMITS = [[5, 2, 3], [1, 3, 2], [4, 1, 1]]
TREE = [[-1, -1], [0, 0, 1], [2, 4]]
PROPOSALS: dict[str, TokenProposalConfig] = {
    "greedy": GreedyTokenProposalConfig(speculative_tokens=4),
    "sampling": SamplingTokenProposalConfig(speculative_tokens=4),
    "static_tree": StaticTreeTokenProposalConfig(initial_branching_factor=3, depth=3),
    "dynamic_tree": DynamicTreeTokenProposalConfig(speculative_tokens=9, expansion_factor=3, depth=4),
    "short_block": ShortBlockTokenProposalConfig(speculative_tokens=2),
}


class Bench:
    """Sequences with features, and a drafter that has committed a part of each."""

    def __init__(self, draft: Any, number: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        self.draft, self.rows, self.done = draft, list(range(number)), [0] * number
        self.tokens = torch.randint(0, MASK, (number, LENGTH), generator=generator)
        shape = (number, LENGTH, len(AUX_LAYERS), WIDTH)
        self.aux = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.drafter = draft.drafter(number)

    def commit(self, counts: Sequence[int]) -> None:
        """Commit ``counts`` tokens of each sequence; the padding of shorter ones is never read."""
        tokens = torch.full((len(counts), max(counts)), 7)
        aux = torch.full((*tokens.shape, *self.aux.shape[2:]), 7.0, dtype=torch.float64)
        for index, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            begin = self.done[row]
            tokens[index, :count] = self.tokens[row, begin + 1 : begin + 1 + count]
            aux[index, :count] = self.aux[row, begin : begin + count]
            self.done[row] += count
        self.drafter.commit(tokens, Features(aux, aux[:, :, 0]), torch.tensor(counts))

    def expected(self, row: int, path: Sequence[int]) -> Tensor:
        """Logits of training after the sequence so far and a path, [D]."""
        done = self.done[row]
        text = torch.cat([self.tokens[row, : done + 1], torch.tensor([*path, 0, 0, 0, 0, 0])])[None]
        aux = torch.full((1, text.shape[1], *self.aux.shape[2:]), 3.0, dtype=torch.float64)
        aux[0, :done] = self.aux[row, :done]
        positions = torch.arange(text.shape[1])[None]
        hidden = self.draft.unroll(
            text, Features(aux, aux[:, :, 0]), positions, torch.zeros_like(positions), len(path) + 1
        )
        return self.draft.logits(hidden[len(path), 0, done - 1], len(path))

    def check(self) -> None:
        """Step through a tree; every row has different tokens."""
        paths: list[list[list[int]]] = [[[]] for _ in self.rows]
        for index, row in enumerate(self.rows):
            torch.testing.assert_close(self.drafter.root[index], self.expected(row, []))
        for wave in TREE:
            first = len(paths[0]) - 1
            tokens = (7 * torch.tensor(self.rows)[:, None] + 5 * torch.arange(first, first + len(wave))) % MASK
            logits = self.drafter.step(tokens, torch.tensor(wave).expand(len(self.rows), -1))
            for index, row in enumerate(self.rows):
                new = [
                    [*paths[index][parent + 1], token]
                    for parent, token in zip(wave, tokens[index].tolist(), strict=True)
                ]
                paths[index] += new
                for node, path in enumerate(new):
                    torch.testing.assert_close(logits[index, node], self.expected(row, path))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_node_of_a_tree_has_the_logits_of_training(kind: str, verifier_of: VerifierOf) -> None:
    bench = Bench(random_draft(verifier_of("qwen3"), kind))
    for counts in COMMITS:
        bench.commit(counts)
        bench.check()
    bench.drafter.select(torch.tensor([2, 1]))
    bench.rows = [2, 1]
    bench.commit([1, 2])
    bench.check()


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "dspark"])
@torch.no_grad()
def test_a_shorter_block_is_that_of_a_draft_with_such_blocks(kind: str, verifier_of: VerifierOf) -> None:
    bench = Bench(random_draft(verifier_of("qwen3"), kind))
    bench.draft = random_draft(verifier_of("qwen3"), kind, block_size=2 + bench.draft.config.first_slot)
    for number, counts in enumerate(COMMITS):
        bench.commit(counts)
        before = bench.drafter.root
        bench.drafter.shorten(2)
        # Only the first block was the trained one.
        assert torch.equal(bench.drafter.root, before) == (number > 0)
        tokens = torch.tensor([[5], [6], [7]])
        logits = bench.drafter.step(tokens, torch.full_like(tokens, -1))
        for index, row in enumerate(bench.rows):
            torch.testing.assert_close(bench.drafter.root[index], bench.expected(row, []))
            torch.testing.assert_close(logits[index, 0], bench.expected(row, tokens[index].tolist()))


@torch.no_grad()
def test_a_round_is_one_forward_pass_for_any_tree(verifier_of: VerifierOf) -> None:
    bench, ran = Bench(random_draft(verifier_of("llama"), "dspark")), []
    bench.draft.layers[0].mlp.register_forward_pre_hook(lambda _, given: ran.append(given[0].shape[0]))
    bench.commit([5, 2, 3])
    for wave in TREE:
        bench.drafter.step(torch.zeros(3, len(wave), dtype=torch.int64), torch.tensor(wave).expand(3, -1))
    assert ran == [3 * bench.draft.config.block_size]


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("kind", ["dflash", "dflash, pruned", "dflash2", "dspark"])
def test_greedy_text_is_the_verifiers_own(kind: str, proposal: str, verifier_of: VerifierOf) -> None:
    verifier = verifier_of("llama")
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([9]), torch.tensor([3, 4, 5, 6, 3, 4, 5])]
    draft = random_draft(verifier, kind)

    def decode(*speculation: Any) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        for emission in Decoder(verifier, *speculation, stop_tokens=[]).decode(prompts, 24, seed=0):
            texts[emission.sequence] += emission.tokens
        return texts

    assert decode(draft, PROPOSALS[proposal]) == decode()


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "dspark, rnn"])
def test_sampled_text_has_the_verifiers_distribution(kind: str, verifier_of: VerifierOf) -> None:
    """Frequencies of the 27 possible texts of three tokens against their exact probabilities."""
    verifier, sampling = verifier_of("llama"), Sampling(temperature=1.0, top_k=3)
    prompt, number = torch.tensor([3, 4, 5]), 4000
    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        texts = torch.stack([torch.cat([prompt, torch.tensor(text, dtype=torch.int64)]) for text in exact])
        rows = sampling.log_probs(verifier(texts).logits[:, -1]).exp().tolist()
        exact = {
            (*text, token): before * probability
            for (text, before), row in zip(exact.items(), rows, strict=True)
            for token, probability in enumerate(row)
            if probability > 0
        }
    proposal = SamplingTokenProposalConfig(speculative_tokens=3)
    decoder = Decoder(verifier, random_draft(verifier, kind), proposal, sampling, stop_tokens=[])
    decoded: list[list[int]] = [[] for _ in range(number)]
    for emission in decoder.decode([prompt] * number, 3, seed=0):
        decoded[emission.sequence] += emission.tokens
    counts = Counter(map(tuple, decoded))
    assert counts.keys() <= exact.keys()
    assert sum(abs(counts[text] / number - probability) for text, probability in exact.items()) / 2 < 0.05


def test_a_chain_longer_than_a_block_is_refused(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("llama")
    with pytest.raises(UsageError, match="greedy proposes 5 tokens ahead, but this draft supports at most 4"):
        Decoder(verifier, random_draft(verifier, "dflash"), GreedyTokenProposalConfig(speculative_tokens=5))
