"""The network: states of packed rows, heads, vocabularies, and what is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from draft_models import FAMILIES, ROUNDED, plain_logits, plain_model, random_draft
from random_verifiers import VOCABULARY, last_only, random_rows
from transformers import BloomConfig, MambaConfig, PreTrainedModel

from specforge import SpeculatorModel
from specforge.documents import DocumentLayout
from specforge.errors import UsageError
from specforge.models.draft_rows import DraftRows
from specforge_draft_model.model import DraftModel

VerifierOf = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("family", FAMILIES)
def test_row_t_at_step_k_has_the_logits_after_token_t_plus_1_plus_k(family: str, verifier_of: VerifierOf) -> None:
    """In packed rows with padding, document by document, and if only the rows of each step run."""
    draft = random_draft(verifier_of("llama"), family)
    model = plain_model(draft)
    tokens, last = random_rows(2, 14)
    documents = torch.tensor([[0] * 6 + [1] * 5 + [-1] * 3, [0] * 14])
    positions = torch.tensor([[*range(6), *range(5), 0, 0, 0], [*range(14)]])
    batch = {"input_ids": tokens, "position_ids": positions, "document_ids": documents}
    expected = torch.zeros(3, 28, VOCABULARY, dtype=torch.float64)
    counts = torch.zeros(3, 28, dtype=torch.bool)
    for row, begin, end in ((0, 0, 6), (0, 6, 11), (1, 0, 14)):
        logits = plain_logits(model, tokens[row, begin:end])
        for step in range(3):
            for t in range(begin, end - 1 - step):
                expected[step, 14 * row + t] = logits[t + 1 + step - begin]
                counts[step, 14 * row + t] = True
    rows = DraftRows.needed(counts, DocumentLayout.of(batch["document_ids"]))
    states, state_index = draft.states(batch, last_only(last), rows), rows.state_index()
    for step in range(3):
        own = counts[step]
        torch.testing.assert_close(draft.logits(states[state_index[step, own]], step), expected[step, own], **ROUNDED)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_gradients_are_those_of_the_plain_model(family: str, verifier_of: VerifierOf) -> None:
    """A tied table gets those of both its uses."""
    draft = random_draft(verifier_of("llama"), family)
    tokens, last = random_rows(1, 9)
    positions = torch.arange(9)[None]
    plain = plain_model(draft).requires_grad_(True)
    plain_logits(plain, tokens[0])[1:].square().sum().backward()
    draft.requires_grad_(True)
    hidden = draft.unroll(tokens, last_only(last), positions, torch.zeros_like(positions), 1)
    draft.logits(hidden[0, 0, :-1]).square().sum().backward()
    expected = {name: weight.grad for name, weight in plain.named_parameters()}
    found = dict(draft.language_model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-3, rtol=1e-3)


def test_a_smaller_table_reads_and_predicts_only_its_ids(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), "llama", vocab_size=20)
    assert draft.draft_ids is not None and draft.draft_ids.tolist() == list(range(20))
    tokens, last = random_rows(1, 9)
    positions, same = torch.arange(9)[None], tokens.clamp(max=19)
    hidden, known = (
        draft.unroll(ids, last_only(last), positions, torch.zeros_like(positions), 2) for ids in (tokens, same)
    )
    assert torch.equal(hidden, known) and draft.logits(hidden).shape == (2, 1, 9, 20)
    assert random_draft(verifier_of("llama"), "llama").draft_ids is None
    with pytest.raises(UsageError, match="the draft has 40 tokens, and the verifier only 31"):
        random_draft(verifier_of("llama"), "llama", vocab_size=40)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
def test_a_written_draft_is_read_unchanged(family: str, verifier_of: VerifierOf, tmp_path: Path) -> None:
    draft = random_draft(verifier_of("llama"), family)
    draft.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=verifier_of("llama"))
    assert isinstance(again, DraftModel) and again.dtype == torch.float64
    tokens, last = random_rows(2, 9)
    positions = torch.arange(9).expand(2, -1)
    outputs = [
        model.unroll(tokens, last_only(last), positions, torch.zeros_like(positions), 2) for model in (draft, again)
    ]
    assert torch.equal(*outputs)
    # A short dtype leaves rotary frequencies exact.
    constants = dict(again.named_buffers())
    again.cast(torch.bfloat16)
    assert all(torch.equal(buffer, constants[name]) for name, buffer in again.named_buffers())


def test_nothing_is_dropped_out_in_training(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    tokens, _ = random_rows(2, 9)
    positions = torch.arange(9).expand(2, -1)
    assert draft.training and torch.equal(draft.advance(tokens, positions), draft.advance(tokens, positions))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2), "cannot draft: it has "),
        (
            BloomConfig(vocab_size=31, hidden_size=16, n_layer=2, n_head=4),
            "cannot draft: it does not use transformers' attention",
        ),
    ],
    ids=["mamba", "bloom"],
)
def test_models_that_cannot_roll_back_tokens_are_refused(config, reason: str, verifier_of: VerifierOf) -> None:
    with pytest.raises(UsageError, match=reason):
        DraftModel.from_training_args(verifier_of("llama").config, config)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "t5"}, "model type 't5' is not a causal language model"),
        ({"model_type": "unheard-of"}, "model_type is 'unheard-of', which transformers does not know"),
        ([1], "must be a dict or a transformers configuration"),
    ],
)
def test_a_stored_configuration_of_another_kind_is_refused(
    values, reason: str, verifier_of: VerifierOf, tmp_path: Path
) -> None:
    random_draft(verifier_of("llama"), "llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"language_model": values}))
    with pytest.raises(UsageError, match=reason):
        SpeculatorModel.from_pretrained(tmp_path)
