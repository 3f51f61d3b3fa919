"""Text of the draft that replaces a part of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from draft_models import plain_model, random_draft
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from specforge.sampling import RandomSource, Sampling
from specforge_draft_model.on_policy import OnPolicySettings, continued, rewritten

VerifierOf = Callable[[str], PreTrainedModel]


def batch_of() -> dict[str, Tensor]:
    """Two rows: one of two documents and padding, one of two turns."""
    documents = [[0] * 8 + [1] * 6 + [-1] * 2, [0] * 16]
    mask = [[0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0]]
    return {
        "input_ids": torch.randint(3, 31, (2, 16), generator=torch.Generator().manual_seed(0)),
        "loss_mask": torch.tensor(mask, dtype=torch.bool),
        "document_ids": torch.tensor(documents),
    }


def changed_spans(batch: dict[str, Tensor], found: Tensor) -> list[tuple[int, int, int]]:
    """Row, first and last index of the changed tokens of each document."""
    spans = []
    for row in range(len(found)):
        for document in range(2):
            own = (batch["document_ids"][row] == document) & (found[row] != batch["input_ids"][row])
            if bool(own.any()):
                indices = own.nonzero()[:, 0]
                spans.append((row, int(indices[0]), int(indices[-1])))
    return spans


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_at_temperature_0_the_drafts_own_greedy_text_is_written(family: str, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), family)
    prompts = [torch.tensor([4, 9, 2, 17]), torch.tensor([8]), torch.tensor([3, 3, 30, 1, 5])]
    written = continued(draft, prompts, 9, Sampling(), RandomSource())
    for prompt, own in zip(prompts, written, strict=True):
        expected = plain_model(draft).generate(
            prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=9, do_sample=False
        )
        assert own.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_a_span_of_one_response_of_each_document_is_rewritten(seed: int, verifier_of: VerifierOf) -> None:
    draft, batch = random_draft(verifier_of("llama"), "llama"), batch_of()
    found = rewritten(draft, batch, OnPolicySettings(new_tokens=3, temperature=0), seed)
    changed = found != batch["input_ids"]
    assert bool(changed.any()) and not bool((changed & ~batch["loss_mask"]).any())
    model = plain_model(draft)
    for row, first, last in changed_spans(batch, found):
        assert last - first < 3
        begin = int((batch["document_ids"][row] == batch["document_ids"][row, first]).nonzero()[0])
        for index in range(first, last + 1):
            logits = model(found[row, None, begin:index]).logits[0, -1]
            assert int(logits.argmax()) == int(found[row, index])


def test_the_seed_determines_the_text(verifier_of: VerifierOf) -> None:
    draft, batch = random_draft(verifier_of("llama"), "llama"), batch_of()
    first, again, other = (rewritten(draft, batch, OnPolicySettings(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_a_response_nothing_is_written(verifier_of: VerifierOf) -> None:
    draft, batch = random_draft(verifier_of("llama"), "llama"), batch_of()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    # A draft needs a token to start from.
    batch["loss_mask"][0, 0] = True
    assert torch.equal(rewritten(draft, batch, OnPolicySettings(), 1), batch["input_ids"])


@given(share=st.floats(0.01, 1), batches=st.integers(1, 300))
def test_the_share_holds_from_the_first_batch_on(share: float, batches: int) -> None:
    settings = OnPolicySettings(share=share)
    chosen: Any = sum(settings.chooses(number) for number in range(batches))
    assert abs(chosen - share * batches) <= 1
