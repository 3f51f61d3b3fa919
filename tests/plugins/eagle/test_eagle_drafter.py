"""Drafting with EAGLE-1 gives the same logits as training, at the same row and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from eagle_drafts import OPTIONS, chain_of_all, random_draft
from random_verifiers import CONFIGS, commit, last_only, random_rows
from torch import Tensor
from transformers import PreTrainedModel

from specforge_eagle.model import EagleSpeculator

LENGTH = 16
STEPS = 4
# Tokens that each sequence commits in each round.
COMMITS = [[5, 2, 3], [1, 3, 2], [4, 1, 1], [1, 1, 2]]

VerifierOf = Callable[[str], PreTrainedModel]


def expected(draft: EagleSpeculator, tokens: Tensor, last: Tensor, path: Sequence[int]) -> Tensor:
    """The chain of training after processed tokens [n + 1] with their states [n, H]: logits after a path, [V]."""
    text = torch.cat([tokens, torch.tensor(path, dtype=torch.int64)])[None]
    # States after the processed tokens are not read.
    states = torch.full((1, text.shape[1], last.shape[-1]), 3.0, dtype=last.dtype)
    states[0, : len(last)] = last
    positions = torch.arange(text.shape[1])[None]
    hidden = draft.unroll(text, last_only(states), positions, torch.zeros_like(positions), steps=len(path) + 1)
    return draft.logits(hidden[len(path), 0, len(last) - 1])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_chain_of_true_tokens_is_the_chain_of_training(family: str, name: str, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of(family), **OPTIONS[name])
    tokens, last = random_rows(3, LENGTH)
    positions = torch.arange(LENGTH).expand(3, -1)
    hidden = draft.unroll(tokens, last_only(last), positions, torch.zeros_like(positions), steps=STEPS)
    trained = draft.logits(hidden)
    drafter, done, rows = draft.drafter(3), [0, 0, 0], torch.arange(3)
    for counts in COMMITS:
        commit(drafter, tokens, last, done, counts)
        ends = torch.tensor(done)
        torch.testing.assert_close(drafter.root, trained[0, rows, ends - 1])
        for step in range(1, STEPS):
            if max(done) + step >= LENGTH:
                break
            logits = drafter.step(tokens[rows, ends + step][:, None], torch.full((3, 1), step - 2))
            torch.testing.assert_close(logits[:, 0], trained[step, rows, ends - 1])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])
@torch.no_grad()
def test_a_window_is_that_of_training(family: str, verifier_of: VerifierOf) -> None:
    verifier = verifier_of(family)
    config = random_draft(verifier).config.model_copy(update={"transformer_layer_config": verifier.config})
    draft = EagleSpeculator(config)
    draft.load_state_dict(random_draft(verifier).state_dict())
    draft.double().attach_verifier(verifier)
    tokens, last = random_rows(3, LENGTH)
    drafter, done = draft.drafter(3), [0, 0, 0]
    for counts in COMMITS:
        commit(drafter, tokens, last, done, counts)
        # A tree of two chains, the second from the first node of the first.
        waves = [([4, 9], [-1, -1]), ([8, 2], [0, 0]), ([5], [3])]
        logits = [drafter.root[:, None]] + [
            drafter.step(torch.tensor(own).expand(3, -1), torch.tensor(parents).expand(3, -1)) for own, parents in waves
        ]
        nodes = torch.cat(logits, dim=1)
        paths = [[], [4], [9], [4, 8], [4, 2], [4, 2, 5]]
        for row, end in enumerate(done):
            for node, path in enumerate(paths):
                own = expected(draft, tokens[row, : end + 1], last[row, :end], path)
                torch.testing.assert_close(nodes[row, node], own)


@torch.no_grad()
def test_some_sequences_can_continue_without_the_others(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("qwen3"), layernorms=True)
    tokens, last = random_rows(3, LENGTH)
    drafter, done = draft.drafter(3), [0, 0, 0]
    commit(drafter, tokens, last, done, [2, 3, 1])
    drafter.step(torch.tensor([[1], [2], [3]]), torch.full((3, 1), -1))
    drafter.select(torch.tensor([2, 0]))
    tokens, last, done = tokens[[2, 0]], last[[2, 0]], [done[2], done[0]]
    commit(drafter, tokens, last, done, [3, 1])
    for row, end in enumerate(done):
        torch.testing.assert_close(drafter.root[row], expected(draft, tokens[row, : end + 1], last[row, :end], []))


def test_any_token_can_be_proposed_at_any_depth(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"))
    assert draft.draft_ids is None and draft.aux_layers == []
    drafter = draft.drafter(1)
    assert drafter.draft_ids is None and drafter.max_depth is None


@torch.no_grad()
def test_the_first_step_reads_the_last_state_after_the_final_norm(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("gemma2")
    draft = random_draft(verifier)
    last = random_rows(2, 5)[1]
    assert torch.equal(draft.first_feature(last_only(last)), verifier.model.norm(last))


def test_packed_documents_equal_separate_ones(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), layernorms=True)
    lengths = [5, 7, 1, 6]
    tokens, last = random_rows(1, sum(lengths) + 3)
    positions = torch.cat([*map(torch.arange, lengths), torch.zeros(3, dtype=torch.int64)])[None]
    documents = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, -1]), torch.tensor([*lengths, 3]))[None]
    packed = draft.unroll(tokens, last_only(last), positions, documents, STEPS)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        separate = draft.unroll(
            tokens[:, part], last_only(last[:, part]), positions[:, part], torch.zeros(1, length).long(), STEPS
        )
        for step in range(STEPS):
            real = max(0, length - 1 - step)
            torch.testing.assert_close(packed[step, :, part][:, :real], separate[step, :, :real])
        begin += length


@pytest.mark.parametrize("detached", [False, True])
def test_gradients_flow_through_what_is_fed_back_unless_detached(detached: bool, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"))
    tokens, feature = random_rows(1, 6)
    positions = torch.arange(6)[None]
    predictions: list[Tensor] = []
    draft.transformer.register_forward_hook(lambda _, __, output: predictions.append(output))
    given = tokens, feature, positions, torch.zeros_like(positions)
    chain = chain_of_all(draft, *given, steps=2, detached=detached)
    (gradient,) = torch.autograd.grad(chain[1, 0, 3].sum(), predictions[0])
    if detached:
        assert not gradient.any()
    else:
        # Only the prediction that row 3 reads again.
        assert (gradient[0].abs().sum(-1) > 0).tolist() == [False, False, False, True, False, False]
    assert torch.equal(chain.detach(), chain_of_all(draft, *given, steps=2).detach())
