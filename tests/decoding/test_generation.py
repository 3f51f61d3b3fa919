"""``SpeculatorModel.generate``, as transformers' ``generate`` looks from outside."""

from __future__ import annotations

import pytest
import torch
from random_verifiers import VOCABULARY
from small_models import CONFIGS, random_draft, random_model

from specforge.errors import UsageError
from specforge.proposals import StaticTreeTokenProposalConfig


@pytest.fixture(scope="module")
def verifier():
    return random_model(CONFIGS["llama"](), seed=3, scale=0.5)


@pytest.fixture(scope="module")
def draft(verifier):
    return random_draft(verifier)


@pytest.fixture(scope="module")
def batch():
    """Three prompts, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (3, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    return ids * mask, mask


@pytest.mark.parametrize("proposal", [None, "dynamic_tree:depth=3", StaticTreeTokenProposalConfig(depth=2)])
def test_gives_what_the_verifier_gives(verifier, draft, batch, proposal):
    ids, mask = batch
    ours = draft.generate(ids, mask, max_new_tokens=12, proposal=proposal)
    theirs = verifier.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, theirs)


def test_ends_at_stop_tokens_and_pads(verifier, draft, batch):
    ids, mask = batch
    free = verifier.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    stops = [int(free[0, 3]), int(free[1, 5])]
    ours = draft.generate(ids, mask, max_new_tokens=12, eos_token_id=stops, pad_token_id=VOCABULARY - 1)
    theirs = verifier.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=VOCABULARY - 1
    )
    assert torch.equal(ours, theirs)


def test_right_padding_and_no_mask_are_understood(verifier, draft):
    ids = torch.tensor([[4, 9, 2], [7, 3, 0]])
    both = draft.generate(ids, torch.tensor([[1, 1, 1], [1, 1, 0]]), max_new_tokens=6)
    assert torch.equal(both[0], draft.generate(ids[:1], max_new_tokens=6)[0])
    assert torch.equal(both[1, 3:], draft.generate(ids[1:, :2], max_new_tokens=6)[0, 2:])


def test_the_same_seed_gives_the_same_text(draft, batch):
    options = {"max_new_tokens": 10, "temperature": 1.0, "top_k": 20, "proposal": "sampling", "verification": "block"}
    first = draft.generate(*batch, seed=4, **options)
    assert torch.equal(first, draft.generate(*batch, seed=4, **options))
    assert not torch.equal(first, draft.generate(*batch, seed=5, **options))


def test_a_streamer_gets_the_prompt_then_what_is_added(draft):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    ids = torch.tensor([[4, 9, 2]])
    text = draft.generate(ids, max_new_tokens=9, streamer=streamer)
    assert streamer.ended and streamer.tokens == text[0].tolist()
    with pytest.raises(ValueError, match="one sequence"):
        draft.generate(ids.repeat(2, 1), streamer=streamer)


def test_needs_the_whole_verifier(verifier):
    draft = random_draft(verifier)
    draft.attach_verifier(verifier, mode="train_only")
    with pytest.raises(ValueError, match="needs the whole verifier; call attach_verifier"):
        draft.generate(torch.tensor([[4, 9]]))
    draft.detach_verifier()
    with pytest.raises(ValueError, match="needs the whole verifier; call attach_verifier"):
        draft.generate(torch.tensor([[4, 9]]))


def test_an_unknown_method_is_named(draft):
    with pytest.raises(UsageError, match=r"'gready'.*Did you mean 'greedy'"):
        draft.generate(torch.tensor([[4, 9]]), proposal="gready")
