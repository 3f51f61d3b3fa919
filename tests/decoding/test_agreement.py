"""Real decoding against a replay of its text: equal rounds, unless the drafter is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from random_verifiers import VOCABULARY
from small_models import CONFIGS, learn, random_draft, random_model
from torch import Tensor

from specforge.decoding.agreement import Agreement, compare_rounds
from specforge.decoding.loop import Decoder
from specforge.models.drafter import Drafter
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import Features, capture

NEW = 20
CHAIN = 3


@pytest.fixture(scope="module")
def verifier():
    return random_model(CONFIGS["qwen3"](), seed=3, scale=0.5)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in (2, 5, 9, 3)]


def decode(verifier, draft, prompts) -> list[tuple[Tensor, list[int]]]:
    """Text and accepted tokens of each round with greedy chains; plain decoding without a draft."""
    proposal = None if draft is None else GreedyTokenProposalConfig(speculative_tokens=CHAIN)
    found = [(prompt.tolist(), []) for prompt in prompts]
    for emission in Decoder(verifier, draft, proposal, stop_tokens=[7]).decode(prompts, NEW):
        text, accepted = found[emission.sequence]
        text += emission.tokens
        accepted += [] if emission.drafted is None else [emission.accepted]
    return [(torch.tensor(text), accepted) for text, accepted in found]


def agreement(verifier, draft, prompts) -> Agreement:
    found = Agreement()
    for prompt, (text, accepted) in zip(prompts, decode(verifier, draft, prompts), strict=True):
        features = capture(verifier, text[None], torch.arange(len(text))[None], draft.aux_layers)
        found += compare_rounds(draft, text, features, len(prompt), accepted, CHAIN)
    return found


@pytest.fixture(scope="module")
def learned(verifier, prompts):
    """A draft overfitted on the texts, so that most of its tokens are accepted."""
    draft = random_draft(verifier, seed=2)
    learn(draft, verifier, [text for text, _ in decode(verifier, None, prompts)], updates=25)
    return draft


@pytest.fixture(scope="module", params=["learned", "pruned"])
def draft(request, verifier, learned):
    return learned if request.param == "learned" else random_draft(verifier, seed=2, size=12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_correct_drafter_agrees_in_every_round(verifier, draft, prompts, dtype):
    wide = verifier.dtype
    try:
        verifier.to(dtype)
        draft.cast(dtype)
        found = agreement(verifier, draft, prompts)
    finally:
        verifier.to(wide)
        draft.cast(wide)
    assert found == Agreement(found.rounds) and found.rounds >= NEW


def wrong_token(commit: Callable[..., None]) -> Callable[..., None]:
    """Commit the wrong token: the one before the last decided one, an off-by-one index."""
    return lambda tokens, features, counts: commit(tokens.roll(1, dims=1), features, counts)


def wrong_feature(commit: Callable[..., None]) -> Callable[..., None]:
    """Commit the wrong features: those of the next token."""

    def wrong(tokens: Tensor, features: Features, counts: Tensor) -> None:
        commit(tokens, replace(features, aux=features.aux.roll(-1, dims=1)), counts)

    return wrong


@pytest.mark.parametrize("fault", [wrong_token, wrong_feature])
def test_a_wrong_drafter_is_found(verifier, learned, prompts, fault, monkeypatch):
    right = type(learned).drafter

    def broken(self, batch_size: int) -> Drafter:
        drafter = right(self, batch_size)
        drafter.commit = fault(drafter.commit)
        return drafter

    monkeypatch.setattr(type(learned), "drafter", broken)
    found = agreement(verifier, learned, prompts)
    assert found.differing > 0
    assert "is rejected in decoding and accepted in replay" in str(found)
    assert f"of {found.rounds:,} rounds" in str(found)


def test_accepted_tokens_that_replay_rejects_are_found(verifier, draft, prompts):
    text, accepted = decode(verifier, draft, prompts)[0]
    features = capture(verifier, text[None], torch.arange(len(text))[None], draft.aux_layers)
    rounds = len(accepted)
    boasted = [CHAIN] * ((len(text) - len(prompts[0]) - 1) // (CHAIN + 1))
    found = compare_rounds(draft, text, features, len(prompts[0]), boasted, CHAIN)
    assert 0 < found.differing <= len(boasted) and "is accepted in decoding and rejected in replay" in found.example
    assert compare_rounds(draft, text, features, len(prompts[0]), [], CHAIN) == Agreement()
    assert found + Agreement(rounds) == Agreement(rounds + found.rounds, found.differing, found.example)
