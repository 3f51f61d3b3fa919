"""The networks compute the same for packed rows as for each document and block separately."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_drafts import AUX_LAYERS, KINDS, MASK, random_draft
from random_verifiers import VOCABULARY, WIDTH
from torch import Tensor
from transformers import PreTrainedModel

from specforge.documents import DocumentLayout
from specforge.models.draft_rows import DraftRows
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.features import Features
from specforge_dflash import model
from specforge_dflash.aux_layers import spread_aux_layers

LENGTHS = [9, 6]
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 6 + [-1] * 2])
VerifierOf = Callable[[str], PreTrainedModel]


def rows_of_text(seed: int = 0) -> tuple[dict[str, Tensor], Features]:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.tensor([[*range(9), *range(6), 0, 0]])
    tokens = torch.randint(0, MASK, (1, 17), generator=generator)
    aux = torch.randn(1, 17, len(AUX_LAYERS), WIDTH, generator=generator, dtype=torch.float64)
    batch = {"input_ids": tokens, "position_ids": positions, "document_ids": DOCUMENTS}
    return batch, Features(aux, aux[:, :, 0])


def part(batch: dict[str, Tensor], features: Features, chosen: slice) -> tuple[dict[str, Tensor], Features]:
    """A part of a document as a separate batch."""
    own = {name: tensor[:, chosen] for name, tensor in batch.items()}
    own["document_ids"] = torch.zeros_like(own["document_ids"])
    return own, Features(features.aux[:, chosen].clone(), features.last[:, chosen])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_block_depends_only_on_its_document_up_to_its_row(kind: str, verifier_of: VerifierOf) -> None:
    """The states of row t in a packed batch equal those of a text that ends with its anchor and the drafted tokens."""
    draft = random_draft(verifier_of("qwen3"), kind)
    batch, features = rows_of_text()
    steps = draft.num_drafted
    packed = draft.unroll(batch["input_ids"], features, batch["position_ids"], DOCUMENTS, steps)[:, 0]
    begin = 0
    for length in LENGTHS:
        for row in range(length - steps - 1):
            cut = slice(begin, begin + row + steps + 1)
            own, states = part(batch, features, cut)
            # Features after the row are not read.
            states.aux[:, row + 1 :] = 5.0
            separate = draft.unroll(own["input_ids"], states, own["position_ids"], own["document_ids"], steps)
            torch.testing.assert_close(separate[:, 0, row], packed[:, begin + row])
        begin += length


@pytest.mark.parametrize("kind", ["dflash", "dflash2, three taps", "dspark, rnn"])
def test_the_needed_rows_have_the_same_states_and_gradients_as_if_all_ran(
    kind: str, verifier_of: VerifierOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = random_draft(verifier_of("llama"), kind)
    batch, features = rows_of_text()
    supervised = torch.zeros(draft.num_drafted, 17, dtype=torch.bool)
    for row, depth in ((2, 1), (3, 4), (4, 2), (11, 3)):
        supervised[:depth, row] = True
    found = []
    documents = DocumentLayout.of(batch["document_ids"])
    for rows in (DraftRows.needed(supervised, documents), DraftRows.all(*supervised.shape, documents)):
        states = draft.states(batch, features, rows)[rows.state_index()[supervised]]
        gradients = torch.autograd.grad(states.square().sum(), list(draft.parameters()), allow_unused=True)
        found.append([states.detach(), *(gradient for gradient in gradients if gradient is not None)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
    monkeypatch.setattr(model, "BLOCKS_AT_ONCE", 3)
    with torch.no_grad():
        rows = DraftRows.needed(supervised, documents)
        torch.testing.assert_close(draft.states(batch, features, rows)[rows.state_index()[supervised]], found[0][0])


def test_unneeded_slots_cost_nothing_after_the_last_keys(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), "dflash")
    batch, features = rows_of_text()
    supervised = torch.zeros(draft.num_drafted, 17, dtype=torch.bool)
    supervised[:4, 3] = supervised[:1, 12] = True
    ran: dict[str, list[int]] = {}
    for name in ("layers.0.mlp", "layers.1.mlp", "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"):
        counts = ran.setdefault(name, [])
        draft.get_submodule(name).register_forward_pre_hook(
            lambda _, given, counts=counts: counts.append(given[0].shape[:-1].numel())
        )
    draft.states(batch, features, DraftRows.needed(supervised, DocumentLayout.of(batch["document_ids"])))
    size = draft.config.block_size
    # The 17 rows of the context have keys, too.
    assert ran == {
        "layers.0.mlp": [2 * size],
        "layers.1.mlp": [5],
        "layers.1.self_attn.q_proj": [5],
        "layers.1.self_attn.k_proj": [17, 2 * size],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_a_distribution_over_the_draft_vocabulary(kind: str, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), kind)
    batch, features = rows_of_text()
    with torch.no_grad():
        states = draft.unroll(batch["input_ids"], features, batch["position_ids"], DOCUMENTS, draft.num_drafted)
        logits = draft.logits(states[0])
    assert logits.shape == (1, 17, draft.config.draft_vocab_size) and not bool(logits.isnan().any())
    if kind.startswith("dspark"):
        torch.testing.assert_close(logits, SpeculatorModel.logits(draft, states[0]))
    if kind.startswith("dflash2"):
        assert bool((logits.isfinite().sum(-1) == 5).all())


def test_fewer_steps_are_the_first_ones_of_the_trained_block(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), "dspark")
    batch, features = rows_of_text()
    with torch.no_grad():
        all_steps, few = (
            draft.unroll(batch["input_ids"], features, batch["position_ids"], DOCUMENTS, steps) for steps in (4, 2)
        )
    torch.testing.assert_close(few, all_steps[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_is_read_as_it_was_written(kind: str, verifier_of: VerifierOf, tmp_path: Any) -> None:
    draft = random_draft(verifier_of("llama"), kind)
    draft.save_pretrained(tmp_path)
    again = type(draft).from_pretrained(tmp_path)
    again.attach_verifier(draft.verifier_parts)
    batch, features = rows_of_text()
    states = [
        network.unroll(batch["input_ids"], features, batch["position_ids"], DOCUMENTS, 3) for network in (draft, again)
    ]
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-6)
    assert not any(name.startswith(("embed", "verifier")) for name in again.state_dict())


def test_default_layers_are_spread_evenly_as_in_published_drafts() -> None:
    # z-lab's Qwen3-8B draft lists outputs from 0: 1, 9, 17, 25, 33.
    assert spread_aux_layers(36, 5) == [2, 10, 18, 26, 34]
    assert spread_aux_layers(30, 1) == [16]
    for layers in range(1, 9):
        chosen = spread_aux_layers(layers, 5)
        assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] <= layers


def test_embeddings_are_the_verifiers_raw_table(verifier_of: VerifierOf) -> None:
    """As in engines: Gemma multiplies its embeddings by a constant."""
    verifier = verifier_of("gemma3")
    draft = random_draft(verifier, "dflash")
    tokens = torch.arange(VOCABULARY)
    assert torch.equal(draft.embed(tokens), verifier.get_input_embeddings().weight)
    assert not torch.equal(verifier.get_input_embeddings()(tokens), draft.embed(tokens))
