"""The EAGLE-3 drafter computes the same logits as the network in training, at the same row and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_verifiers import VOCABULARY
from small_models import AUX_LAYERS, random_draft
from torch import Tensor
from transformers import PreTrainedModel

from specforge.models.chain.drafter import FeatureDrafter
from specforge.verifier.features import Features
from specforge_eagle3.model import Eagle3DraftModel

LENGTH = 16
STEPS = 4
# Tokens that each sequence commits in each round.
COMMITS = [[5, 2, 3], [1, 3, 2], [4, 1, 1], [1, 1, 2]]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "eagle-3.1, two layers": {
        "norm_before_residual": True,
        "fc_norm": True,
        "norm_output": True,
        "num_layers": 2,
        "embed_requires_grad": True,
    },
    "qwen3": {"layer_type": "qwen3", "num_layers": 2},
    "pruned": {"size": 9},
}

NamedVerifiers = Callable[[str], PreTrainedModel]


@dataclass
class Bench:
    """A draft, sequences with features, and a drafter that has committed some of them.

    ``done`` is the number of tokens of each sequence that the verifier has processed.
    """

    draft: Eagle3DraftModel
    rows: list[int]
    drafter: FeatureDrafter

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        number = len(self.rows)
        self.tokens = torch.randint(0, VOCABULARY, (number, LENGTH), generator=generator)
        width = self.draft.config.transformer_layer_config.hidden_size
        shape = (number, LENGTH, len(AUX_LAYERS), width)
        self.aux = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.done = [0] * number

    @classmethod
    def of(cls, draft: Eagle3DraftModel, number: int = 3) -> Bench:
        return cls(draft, list(range(number)), draft.drafter(number))

    def commit(self, counts: Sequence[int]) -> None:
        """Commit ``counts`` tokens of each sequence; the shorter ones are padded with arbitrary values."""
        longest = max(counts)
        tokens = torch.full((len(counts), longest), VOCABULARY - 1)
        aux = torch.full((len(counts), longest, *self.aux.shape[2:]), 7.0, dtype=torch.float64)
        for index, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            begin = self.done[row]
            tokens[index, :count] = self.tokens[row, begin + 1 : begin + 1 + count]
            aux[index, :count] = self.aux[row, begin : begin + count]
            self.done[row] += count
        self.drafter.commit(tokens, Features(aux, aux[:, :, 0]), torch.tensor(counts))

    def select(self, indices: Sequence[int]) -> None:
        self.drafter.select(torch.tensor(indices))
        self.rows = [self.rows[index] for index in indices]

    def expected(self, row: int, path: Sequence[int]) -> Tensor:
        """Training-time test of the sequence so far and a path after it: logits after the path, [D]."""
        done = self.done[row]
        text = torch.cat([self.tokens[row, : done + 1], torch.tensor(path, dtype=torch.int64)])[None]
        # Features after the processed tokens are not read.
        aux = torch.full((1, text.shape[1], *self.aux.shape[2:]), 3.0, dtype=torch.float64)
        aux[0, :done] = self.aux[row, :done]
        positions = torch.arange(text.shape[1])[None]
        features = Features(aux, aux[:, :, 0])
        hidden = self.draft.unroll(text, features, positions, torch.zeros_like(positions), steps=len(path) + 1)
        return self.draft.logits(hidden[len(path), 0, done - 1])

    def check_tree(self, waves: Sequence[Sequence[int]]) -> None:
        """Step through a tree, given the parents of the nodes of each wave; every row has different tokens."""
        for index, row in enumerate(self.rows):
            torch.testing.assert_close(self.drafter.root[index], self.expected(row, []))
        paths: list[list[list[int]]] = [[[]] for _ in self.rows]
        for wave in waves:
            parents = torch.tensor(wave).expand(len(self.rows), -1)
            first = len(paths[0]) - 1
            tokens = (7 * torch.tensor(self.rows)[:, None] + 5 * torch.arange(first, first + len(wave))) % VOCABULARY
            logits = self.drafter.step(tokens, parents)
            for index, row in enumerate(self.rows):
                new = [
                    [*paths[index][parent + 1], token]
                    for parent, token in zip(wave, tokens[index].tolist(), strict=True)
                ]
                paths[index] += new
                for node, path in enumerate(new):
                    torch.testing.assert_close(logits[index, node], self.expected(row, path))


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_chain_of_true_tokens_is_the_training_time_test(name: str, verifier_named: NamedVerifiers) -> None:
    bench = Bench.of(random_draft(verifier_named("untied llama"), **OPTIONS[name]))
    positions = torch.arange(LENGTH).expand(3, -1)
    features = Features(bench.aux, bench.aux[:, :, 0])
    hidden = bench.draft.unroll(bench.tokens, features, positions, torch.zeros_like(positions), steps=STEPS)
    # [S, B, T, D]
    trained = bench.draft.logits(hidden)
    for counts in COMMITS:
        bench.commit(counts)
        done = torch.tensor(bench.done)
        rows = torch.arange(3)
        torch.testing.assert_close(bench.drafter.root, trained[0, rows, done - 1])
        for step in range(1, STEPS):
            if max(bench.done) + step >= LENGTH:
                break
            parents = torch.full((3, 1), step - 2)
            logits = bench.drafter.step(bench.tokens[rows, done + step][:, None], parents)
            torch.testing.assert_close(logits[:, 0], trained[step, rows, done - 1])


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_node_of_a_tree_is_the_chain_along_its_path(name: str, verifier_named: NamedVerifiers) -> None:
    bench = Bench.of(random_draft(verifier_named("untied llama"), **OPTIONS[name]))
    for counts, waves in zip(
        COMMITS,
        [[[-1, -1], [0, 0, 1], [2, 4]], [], [[-1], [0], [1]], [[-1, -1, -1], [2, 1, 0, 1]]],
        strict=True,
    ):
        bench.commit(counts)
        bench.check_tree(waves)


@settings(max_examples=10)
@given(data=st.data())
@torch.no_grad()
def test_any_trees_after_any_commits(data: st.DataObject, verifier_named: NamedVerifiers) -> None:
    bench = Bench.of(random_draft(verifier_named("untied llama"), size=9, num_layers=2))
    for _ in range(data.draw(st.integers(1, 3), label="rounds")):
        bench.commit([data.draw(st.integers(1, 4)) for _ in bench.rows])
        nodes, waves = 0, []
        for _ in range(data.draw(st.integers(0, 2), label="waves")):
            width = data.draw(st.integers(1, 3))
            waves.append([data.draw(st.integers(-1, nodes - 1)) for _ in range(width)])
            nodes += width
        bench.check_tree(waves)
        if data.draw(st.booleans(), label="some have ended"):
            indices = st.integers(0, len(bench.rows) - 1)
            bench.select(data.draw(st.lists(indices, min_size=1, max_size=len(bench.rows), unique=True)))


@torch.no_grad()
def test_sequences_may_end_before_anything_is_committed(verifier_named: NamedVerifiers) -> None:
    """The first token of a sequence, which comes from the prefill, may be its last."""
    bench = Bench.of(random_draft(verifier_named("untied llama")))
    bench.select([2, 0])
    bench.commit([3, 1])
    bench.check_tree([[-1, -1], [1]])


@pytest.mark.parametrize("window", [1, 2, 3, 5, 99])
@torch.no_grad()
def test_a_sliding_window_is_that_of_training(window: int, verifier_named: NamedVerifiers) -> None:
    """A draft with a sliding window drafts as it was trained and measured."""
    draft = random_draft(verifier_named("untied llama"))
    layers = draft.config.transformer_layer_config
    layers.layer_types, layers.sliding_window = ["sliding_attention"], window
    bench = Bench.of(draft)
    for counts in COMMITS:
        bench.commit(counts)
        bench.check_tree([[-1, -1], [0, 1], [3]])


@torch.no_grad()
def test_draft_tokens_are_translated(verifier_named: NamedVerifiers) -> None:
    draft = random_draft(verifier_named("untied llama"), size=9)
    drafter = draft.drafter(2)
    assert draft.draft_ids is not None
    assert drafter.to_verifier(torch.tensor([[0, 8], [3, 3]])).tolist() == [
        [int(draft.draft_ids[0]), int(draft.draft_ids[8])],
        [int(draft.draft_ids[3])] * 2,
    ]
    unpruned = random_draft(verifier_named("untied llama")).drafter(2)
    assert unpruned.to_verifier(torch.tensor([5])).tolist() == [5]
