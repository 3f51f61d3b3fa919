"""The drafter computes the same logits as the plain language model, along chains and in trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from draft_models import FAMILIES, ROUNDED, plain_logits, plain_model, random_draft
from hypothesis import given, settings
from hypothesis import strategies as st
from random_verifiers import VOCABULARY, commit, last_only, random_rows
from torch import Tensor
from transformers import PreTrainedModel

from specforge.decoding.loop import Decoder
from specforge.decoding.recorded import chain_acceptance, replay_text
from specforge.decoding.replay import replay
from specforge.proposals import DynamicTreeTokenProposalConfig, GreedyTokenProposalConfig
from specforge.proposals.dynamic_tree import DynamicTreeProposer
from specforge.sampling import RandomSource, Sampling
from specforge.verifier.features import capture
from specforge_draft_model.drafter import ModelDrafter

LENGTH, STEPS = 16, 4
# Tokens that each sequence commits in each round.
COMMITS = [[5, 2, 3], [1, 3, 2], [4, 1, 1], [1, 1, 2]]
PROPOSALS = [
    "greedy:speculative_tokens=4",
    "sampling:speculative_tokens=3",
    "static_tree",
    "dynamic_tree:depth=4,expansion_factor=3,speculative_tokens=9",
]

VerifierOf = Callable[[str], PreTrainedModel]


def prefilled(drafter: ModelDrafter, tokens: Tensor) -> ModelDrafter:
    drafter.begin(tokens[:, 0])
    return drafter


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_chain_of_true_tokens_is_the_chain_of_training(family: str, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), family)
    tokens, last = random_rows(3, LENGTH)
    positions = torch.arange(LENGTH).expand(3, -1)
    hidden = draft.unroll(tokens, last_only(last), positions, torch.zeros_like(positions), steps=STEPS)
    trained = [draft.logits(hidden[step], step) for step in range(STEPS)]
    drafter, done, rows = prefilled(draft.drafter(3), tokens), [0, 0, 0], torch.arange(3)
    for counts in COMMITS:
        commit(drafter, tokens, last, done, counts)
        ends = torch.tensor(done)
        torch.testing.assert_close(drafter.root, trained[0][rows, ends - 1], **ROUNDED)
        for step in range(1, STEPS):
            if max(done) + step >= LENGTH:
                break
            logits = drafter.step(tokens[rows, ends + step][:, None], torch.full((3, 1), step - 2))
            torch.testing.assert_close(logits[:, 0], trained[step][rows, ends - 1], **ROUNDED)


def check_tree(
    drafter: ModelDrafter, model: PreTrainedModel, tokens: Tensor, done: Sequence[int], waves: Sequence[Sequence[int]]
) -> None:
    """Step through a tree, given the parents of the nodes of each wave; every row has different tokens."""
    texts = [row[: end + 1].tolist() for row, end in zip(tokens, done, strict=True)]
    for row, text in enumerate(texts):
        torch.testing.assert_close(drafter.root[row], plain_logits(model, torch.tensor(text))[-1], **ROUNDED)
    paths: list[list[list[int]]] = [[[]] for _ in texts]
    for wave in waves:
        first = len(paths[0]) - 1
        own = (7 * torch.arange(len(texts))[:, None] + 5 * torch.arange(first, first + len(wave))) % VOCABULARY
        logits = drafter.step(own, torch.tensor(wave).expand(len(texts), -1))
        for row, text in enumerate(texts):
            new = [[*paths[row][parent + 1], token] for parent, token in zip(wave, own[row].tolist(), strict=True)]
            paths[row] += new
            for node, path in enumerate(new):
                expected = plain_logits(model, torch.tensor([*text, *path]))[-1]
                torch.testing.assert_close(logits[row, node], expected, **ROUNDED)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_node_of_a_tree_is_the_text_along_its_path(family: str, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), family)
    model = plain_model(draft)
    tokens, last = random_rows(3, LENGTH)
    drafter, done = prefilled(draft.drafter(3), tokens), [0, 0, 0]
    for counts, waves in zip(
        COMMITS,
        [[[-1, -1], [0, 0, 1], [2, 4]], [], [[-1], [0], [1]], [[-1, -1, -1], [2, 1, 0, 1]]],
        strict=True,
    ):
        commit(drafter, tokens, last, done, counts)
        check_tree(drafter, model, tokens, done, waves)


@settings(max_examples=10)
@given(data=st.data())
@torch.no_grad()
def test_any_trees_after_any_commits(data: st.DataObject, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), "mistral", hidden_size=12)
    model = plain_model(draft)
    tokens, last = random_rows(3, LENGTH)
    drafter, done = prefilled(draft.drafter(3), tokens), [0, 0, 0]
    if data.draw(st.booleans(), label="some end before anything is committed"):
        drafter.select(torch.tensor([2, 0]))
        tokens, last, done = tokens[[2, 0]], last[[2, 0]], [0, 0]
    for _ in range(data.draw(st.integers(1, 3), label="rounds")):
        commit(drafter, tokens, last, done, [data.draw(st.integers(1, 4)) for _ in done])
        nodes, waves = 0, []
        for _ in range(data.draw(st.integers(0, 2), label="waves")):
            width = data.draw(st.integers(1, 3))
            waves.append([data.draw(st.integers(-1, nodes - 1)) for _ in range(width)])
            nodes += width
        check_tree(drafter, model, tokens, done, waves)
        if data.draw(st.booleans(), label="some have ended"):
            indices = st.integers(0, len(done) - 1)
            kept = data.draw(st.lists(indices, min_size=1, max_size=len(done), unique=True))
            drafter.select(torch.tensor(kept))
            tokens, last, done = tokens[kept], last[kept], [done[index] for index in kept]


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_text_is_the_verifiers_own(proposal: str, verifier_of: VerifierOf) -> None:
    """For any draft, of another family or with fewer tokens."""
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    for family, own in (("llama", "gemma2"), ("gemma3", "gpt2")):
        verifier = verifier_of(family)
        expected = verifier.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        for size in (VOCABULARY, 23):
            draft = random_draft(verifier, own, vocab_size=size)
            assert torch.equal(draft.generate(ids, max_new_tokens=12, proposal=proposal), expected)


@torch.no_grad()
def test_a_draft_that_is_the_verifier_is_always_right(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("gemma3")
    draft = random_draft(verifier, "gemma3", layers=3)
    draft.language_model.load_state_dict(
        {name: verifier.state_dict()[name] for name in draft.language_model.state_dict()}
    )
    decoder = Decoder(verifier, draft, GreedyTokenProposalConfig(speculative_tokens=4))
    rounds = [
        emission for emission in decoder.decode([torch.tensor([4]), torch.tensor([3, 9, 2])], 21) if emission.drafted
    ]
    assert rounds and all(len(emission.tokens) == 5 for emission in rounds)


@torch.no_grad()
def test_replay_takes_the_rounds_of_real_decoding(verifier_of: VerifierOf) -> None:
    """At temperature 0 the text determines every round: chains by the states of one pass, trees by the drafter."""
    verifier = verifier_of("llama")
    draft = random_draft(verifier, "llama", layers=3)
    # Sometimes right: the verifier's weights with noise.
    generator = torch.Generator().manual_seed(3)
    for name, tensor in draft.language_model.state_dict().items():
        tensor.copy_(verifier.state_dict()[name] + 0.02 * torch.randn(tensor.shape, generator=generator))
    prompts = [torch.tensor([4, 9, 2, 17]), torch.tensor([8]), torch.tensor([3, 3, 30, 1, 5])]
    tree = DynamicTreeTokenProposalConfig(speculative_tokens=9, expansion_factor=3, depth=4)
    for proposal in (GreedyTokenProposalConfig(speculative_tokens=3), tree):
        decoder = Decoder(verifier, draft, proposal)
        emissions = list(decoder.decode(prompts, 40))
        for number, prompt in enumerate(prompts):
            own = [emission for emission in emissions if emission.sequence == number]
            text = torch.cat([prompt, torch.tensor([token for emission in own for token in emission.tokens])])
            accepted = [emission.accepted for emission in own if emission.drafted is not None]
            positions = torch.arange(len(text))[None]
            features = capture(verifier, text[None], positions, [])
            if proposal is tree:
                proposer = DynamicTreeProposer(tree, Sampling(), RandomSource())
                found = replay_text(proposer, draft.drafter(1), text, features, len(prompt))
                assert [count for _, count in found] == accepted
                continue
            greedy, _ = chain_acceptance(draft, decoder.parts, text, features, len(prompt), 3, Sampling())
            replayed = replay(greedy.T[None], torch.tensor([greedy.shape[1]]))
            assert float(replayed.rounds[2]) == len(accepted) and max(accepted) > 0
            for count in range(1, 4):
                assert float(replayed.accepted[2, count - 1]) == sum(length >= count for length in accepted)
