"""Drafting gives the same logits as training, and lossless text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mlp_drafts import FAMILIES, OPTIONS, random_draft, slow_heads
from random_verifiers import VOCABULARY, commit, last_only, random_rows
from transformers import PreTrainedModel

from specforge.decoding.loop import Decoder
from specforge.errors import UsageError
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import capture
from specforge_mlp.candidate_tree import CandidateTreeTokenProposalConfig

LENGTH = 16
STEPS = 4
# Tokens that each sequence commits in each round.
COMMITS = [[5, 2, 3], [1, 3, 2], [4, 1, 1], [1, 1, 2]]
PROPOSALS = [
    "greedy:speculative_tokens=4",
    "greedy:speculative_tokens=2",
    "dynamic_tree:depth=4,expansion_factor=3,speculative_tokens=9",
    "static_tree",
    "sampling:speculative_tokens=4",
    "candidate_tree",
    "candidate_tree:n_candidates=9",
]

VerifierOf = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_chain_of_true_tokens_is_the_chain_of_training(family: str, name: str, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of(family), num_layers=STEPS, **OPTIONS[name])
    tokens, last = random_rows(3, LENGTH)
    positions = torch.arange(LENGTH).expand(3, -1)
    hidden = draft.unroll(tokens, last_only(last), positions, torch.zeros_like(positions), steps=STEPS)
    trained = [draft.logits(hidden[step], step) for step in range(STEPS)]
    drafter, done, rows = draft.drafter(3), [0, 0, 0], torch.arange(3)
    for counts in COMMITS:
        commit(drafter, tokens, last, done, counts)
        ends = torch.tensor(done)
        torch.testing.assert_close(drafter.root, trained[0][rows, ends - 1])
        for step in range(1, STEPS):
            if max(done) + step >= LENGTH:
                break
            logits = drafter.step(tokens[rows, ends + step][:, None], torch.full((3, 1), step - 2))
            torch.testing.assert_close(logits[:, 0], trained[step][rows, ends - 1])


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_nodes_of_different_depths_may_be_stepped_at_once(name: str, verifier_of: VerifierOf) -> None:
    """Each is drafted by the head of its depth, which may differ between rows."""
    verifier = verifier_of("llama")
    draft = random_draft(verifier, num_layers=STEPS, **OPTIONS[name])
    tokens, last = random_rows(2, LENGTH)
    drafter, done = draft.drafter(2), [0, 0]
    commit(drafter, tokens, last, done, [3, 5])
    waves = [
        ([[4, 9], [7, 4]], [[-1, -1], [-1, -1]]),
        ([[8, 2], [5, 3]], [[0, -1], [1, 1]]),
        ([[6, 1, 5], [2, 2, 8]], [[2, 3, -1], [0, 2, 3]]),
        ([[11, 12], [13, 14]], [[5, 1], [4, -1]]),
    ]
    paths: list[list[list[int]]] = [[[]], [[]]]
    nodes = [drafter.root[:, None]]
    for own, parents in waves:
        nodes.append(drafter.step(torch.tensor(own), torch.tensor(parents)))
        for row in range(2):
            paths[row] += [
                [*paths[row][parent + 1], token] for token, parent in zip(own[row], parents[row], strict=True)
            ]
    drafted = torch.cat(nodes, dim=1)
    assert [len(path) for path in paths[0]] == [0, 1, 1, 2, 1, 3, 2, 1, 3, 2]
    assert [len(path) for path in paths[1]] == [0, 1, 1, 2, 2, 2, 3, 3, 3, 1]
    for row, end in enumerate(done):
        state = verifier.model.norm(last[row, end - 1])
        for node, path in enumerate(paths[row]):
            expected = slow_heads(draft.state_dict(), draft.config, state, [int(tokens[row, end]), *path])[-1]
            torch.testing.assert_close(drafted[row, node], expected)


@torch.no_grad()
def test_some_sequences_can_continue_without_the_others(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("qwen3")
    draft = random_draft(verifier)
    tokens, last = random_rows(3, LENGTH)
    drafter, done = draft.drafter(3), [0, 0, 0]
    commit(drafter, tokens, last, done, [2, 3, 1])
    drafter.step(torch.tensor([[1], [2], [3]]), torch.full((3, 1), -1))
    drafter.select(torch.tensor([2, 0]))
    tokens, last, done = tokens[[2, 0]], last[[2, 0]], [done[2], done[0]]
    commit(drafter, tokens, last, done, [3, 1])
    for row, end in enumerate(done):
        state = verifier.model.norm(last[row, end - 1])
        expected = slow_heads(draft.state_dict(), draft.config, state, [int(tokens[row, end])])[0]
        torch.testing.assert_close(drafter.root[row], expected)


def test_chains_are_as_deep_as_the_number_of_heads(verifier_of: VerifierOf) -> None:
    drafter = random_draft(verifier_of("llama"), num_layers=3).drafter(1)
    assert drafter.max_depth == 3 and drafter.draft_ids is None


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_the_verifiers_own(family: str, proposal: str, verifier_of: VerifierOf) -> None:
    verifier = verifier_of(family)
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = verifier.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    for options in OPTIONS.values():
        draft = random_draft(verifier, **options)
        assert torch.equal(draft.generate(ids, max_new_tokens=20, proposal=proposal), expected)


def test_the_default_chain_has_one_token_per_head(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), num_layers=2)
    methods = draft.config.speculators_config
    assert methods.default_proposal_method == "greedy"
    assert methods.proposal_methods[0].speculative_tokens == 2
    ids = torch.tensor([[4, 9, 2]])
    expected = draft.verifier.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert torch.equal(draft.generate(ids, max_new_tokens=9), expected)


@pytest.mark.parametrize(
    ("proposal", "depth"),
    [
        ("greedy:speculative_tokens=5", 5),
        ("sampling:speculative_tokens=6", 6),
        ("dynamic_tree:depth=5", 5),
        (CandidateTreeTokenProposalConfig(top_k_tokens_per_head=[2, 1, 1, 1, 1]), 5),
    ],
)
def test_more_tokens_ahead_than_heads_are_refused(proposal: Any, depth: int, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), num_layers=4)
    with pytest.raises(UsageError, match=f"proposes {depth} tokens ahead, but this draft supports at most 4"):
        draft.generate(torch.tensor([[4, 9]]), max_new_tokens=4, proposal=proposal)


@pytest.mark.parametrize("name", OPTIONS)
def test_text_is_accepted_from_a_draft_that_is_right(name: str, verifier_of: VerifierOf) -> None:
    """A draft that has memorised the answer is accepted, so the loop reads proposals correctly."""
    verifier = verifier_of("llama")
    prompt = torch.tensor([[4, 9, 2, 17]])
    text = verifier.generate(prompt, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(prompt))
    draft = random_draft(verifier, num_layers=4, **OPTIONS[name])
    positions = torch.arange(text.shape[1])[None]
    features = capture(verifier, text, positions, draft.aux_layers)
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-2)
    for _ in range(100):
        hidden = draft.unroll(text, features, positions, torch.zeros_like(positions), steps=4)
        logits = [draft.logits(hidden[step], step) for step in range(4)]
        loss = sum(
            torch.nn.functional.cross_entropy(logits[step][0, 3 : -2 - step], text[0, 5 + step :]) for step in range(4)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoder = Decoder(verifier, draft, GreedyTokenProposalConfig(speculative_tokens=4))
    rounds = [emission for emission in decoder.decode([prompt[0]], 24) if emission.drafted is not None]
    assert sum(len(emission.tokens) for emission in rounds) > 4 * len(rounds)
    for proposal in ("greedy", "candidate_tree"):
        assert torch.equal(draft.generate(prompt, max_new_tokens=24, proposal=proposal), text)
