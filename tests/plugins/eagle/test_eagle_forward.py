"""One pass of the network, called like a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eagle_drafts import OPTIONS, chain_of_all, random_draft
from random_verifiers import CONFIGS, VOCABULARY, WIDTH, last_only, random_rows
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from specforge_eagle.model import EagleSpeculator

BATCH, LENGTH = 2, 9
# Rotary embeddings are computed in float32, and the softmax too if weights are requested.
SHORT = {"atol": 1e-5, "rtol": 1e-4}
VerifierOf = Callable[[str], PreTrainedModel]


@pytest.fixture(scope="module", params=CONFIGS)
def draft(request: pytest.FixtureRequest, verifier_of: VerifierOf) -> EagleSpeculator:
    return random_draft(verifier_of(request.param), layernorms=True)


@pytest.fixture(scope="module", params=["mistral", "gemma2", "gemma3"])
def sliding_draft(request: pytest.FixtureRequest, verifier_of: VerifierOf) -> EagleSpeculator:
    """The layer keeps the window of its verifier's first layer."""
    verifier = verifier_of(request.param)
    plain = random_draft(verifier)
    draft = EagleSpeculator(plain.config.model_copy(update={"transformer_layer_config": verifier.config}))
    draft.load_state_dict(plain.state_dict())
    draft.attach_verifier(verifier)
    return draft.double()


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    return random_rows(BATCH, LENGTH)


def logits_of(draft: EagleSpeculator, *rows: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        output = draft(*rows, return_dict=False, **options)
    assert isinstance(output, Tensor)
    return output


def first_step(draft: EagleSpeculator, tokens: Tensor, features: Tensor) -> Tensor:
    """The same pass with the attention of training, where row t reads token t + 1."""
    shifted = torch.cat([tokens[:, :1], tokens], dim=1)
    padded = torch.cat([features, features[:, :1]], dim=1)
    positions = torch.arange(shifted.shape[1]).expand(len(tokens), -1)
    with torch.no_grad():
        hidden = chain_of_all(draft, shifted, padded, positions, torch.zeros_like(positions), steps=1)
        return draft.logits(hidden[0, :, :-1])


def test_is_the_first_step_of_training(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    logits = logits_of(draft, *rows)
    assert logits.shape == (BATCH, LENGTH, VOCABULARY)
    torch.testing.assert_close(logits, first_step(draft, *rows))


def test_a_window_is_that_of_training(sliding_draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    expected = first_step(sliding_draft, *rows)
    torch.testing.assert_close(logits_of(sliding_draft, *rows), expected)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    torch.testing.assert_close(logits_of(sliding_draft, *rows, attention_mask=mask), expected)
    torch.testing.assert_close(logits_of(sliding_draft, *rows, output_attentions=True), expected, **SHORT)


def test_a_window_matters(sliding_draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    other = rows[1].clone()
    other[:, 0] += 1
    same = (logits_of(sliding_draft, *rows) == logits_of(sliding_draft, rows[0], other)).all(-1).all(0)
    window = sliding_draft.config.transformer_layer_config.sliding_window
    assert same.tolist() == [False] * window + [True] * (LENGTH - window)


@pytest.mark.parametrize("index", [0, 4, 8])
def test_rows_never_see_the_future(index: int, draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    tokens, features = rows
    before = logits_of(draft, *rows)
    other_tokens, other_features = tokens.clone(), features.clone()
    other_tokens[:, index] = (tokens[:, index] + 7) % VOCABULARY
    other_features[:, index] += 1
    for changed in (logits_of(draft, other_tokens, features), logits_of(draft, tokens, other_features)):
        differs = (changed != before).any(-1).all(0)
        assert differs.tolist() == [row >= index for row in range(LENGTH)]


def test_padding_on_the_right_is_not_seen(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    tokens, features = rows
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, 5:] = 0
    logits = logits_of(draft, tokens, features, attention_mask=mask)
    torch.testing.assert_close(logits[0, :5], logits_of(draft, tokens[:1, :5], features[:1, :5])[0])
    torch.testing.assert_close(logits[1], logits_of(draft, tokens[1:], features[1:])[0])


def test_padding_on_the_left_is_not_seen(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    tokens, features = rows
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, :4] = False
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = logits_of(draft, tokens, features, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(logits[0, 4:], logits_of(draft, tokens[:1, 4:], features[:1, 4:])[0])
    torch.testing.assert_close(logits[1], logits_of(draft, tokens[1:], features[1:])[0])


def two_documents(length: int = LENGTH, first: int = 4) -> Tensor:
    """The mask of visible rows, [1, 1, T, T], for two documents."""
    document = (torch.arange(length) >= first).long()
    return (torch.ones(length, length).tril().bool() & (document[:, None] == document))[None, None]


@pytest.mark.parametrize("kind", ["truth values", "numbers", "added"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_mask_may_state_the_visible_rows(
    kind: str, weights: bool, draft: EagleSpeculator, rows: tuple[Tensor, Tensor]
) -> None:
    tokens, features = rows
    sees = two_documents().expand(BATCH, -1, -1, -1)
    mask = {
        "truth values": sees,
        "numbers": sees.long(),
        "added": torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min),
    }[kind]
    positions = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)])[None]
    logits = logits_of(draft, tokens, features, attention_mask=mask, position_ids=positions, output_attentions=weights)
    for part in (slice(0, 4), slice(4, LENGTH)):
        torch.testing.assert_close(logits[:, part], logits_of(draft, tokens[:, part], features[:, part]), **SHORT)


def test_positions_that_restart_begin_a_document(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    tokens, features = rows
    positions = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)])[None]
    logits = logits_of(draft, tokens, features, position_ids=positions)
    for part in (slice(0, 4), slice(4, LENGTH)):
        torch.testing.assert_close(logits[:, part], logits_of(draft, tokens[:, part], features[:, part]))


def test_positions_count_the_rows_from_zero(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    assert torch.equal(logits_of(draft, *rows), logits_of(draft, *rows, position_ids=positions))
    # Rotary positions are relative, but distances matter.
    shifted = logits_of(draft, *rows, position_ids=positions + 5)
    torch.testing.assert_close(shifted, logits_of(draft, *rows), **SHORT)
    spread = logits_of(draft, *rows, attention_mask=torch.ones(BATCH, LENGTH), position_ids=3 * positions)
    assert (spread - logits_of(draft, *rows)).abs().max() > 1e-3


@pytest.mark.parametrize("pieces", [(4, 5), (1, 8), (3, 1, 1, 4)])
@pytest.mark.parametrize("weights", [False, True])
def test_pieces_with_a_cache_are_one_pass(
    pieces: tuple[int, ...], weights: bool, draft: EagleSpeculator, rows: tuple[Tensor, Tensor]
) -> None:
    cache = DynamicCache()
    logits = [
        logits_of(draft, tokens, features, past_key_values=cache, output_attentions=weights)
        for tokens, features in zip(rows[0].split(pieces, 1), rows[1].split(pieces, 1), strict=True)
    ]
    assert cache.get_seq_length() == LENGTH
    torch.testing.assert_close(torch.cat(logits, dim=1), logits_of(draft, *rows), **SHORT)


def test_pieces_in_a_window_are_one_pass(sliding_draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    cache = DynamicCache()
    logits = [
        logits_of(sliding_draft, tokens, features, past_key_values=cache)
        for tokens, features in zip(rows[0].split(6, 1), rows[1].split(6, 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(logits, dim=1), logits_of(sliding_draft, *rows))


def test_pieces_with_padding_are_one_pass(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    one_pass = logits_of(draft, *rows, attention_mask=mask, position_ids=positions)
    cache = DynamicCache()
    for part in (slice(0, 5), slice(5, LENGTH)):
        logits = logits_of(
            draft,
            rows[0][:, part],
            rows[1][:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=positions[:, part],
            past_key_values=cache,
        )
        real = mask[:, part].bool()
        torch.testing.assert_close(logits[real], one_pass[:, part][real])


def test_a_cache_is_returned_on_request(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    assert draft(*rows).past_key_values is None
    fresh = draft(*rows, use_cache=True).past_key_values
    assert fresh.get_seq_length() == LENGTH
    given = DynamicCache()
    assert draft(*rows, past_key_values=given).past_key_values is given
    assert draft(*rows, past_key_values=DynamicCache(), use_cache=False).past_key_values is None


def test_weights_are_returned_on_request(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    assert draft(*rows).attentions is None
    with torch.no_grad():
        output = draft(*rows, output_attentions=True)
    (weights,) = output.attentions
    heads = draft.config.transformer_layer_config.num_attention_heads
    assert weights.shape == (BATCH, heads, LENGTH, LENGTH)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **SHORT)
    assert not weights.triu(1).any()
    torch.testing.assert_close(output.logits, logits_of(draft, *rows), **SHORT)


def test_states_are_returned_on_request(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    assert draft(*rows).hidden_states is None
    with torch.no_grad():
        output = draft(*rows, output_hidden_states=True)
        fused, predicted = output.hidden_states
        assert torch.equal(fused, draft.fuse(*rows))
        assert torch.equal(draft.logits(predicted), output.logits)
    assert predicted.shape == (BATCH, LENGTH, WIDTH)


def test_the_kind_of_output_can_be_chosen(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    assert isinstance(draft(*rows), CausalLMOutputWithPast)
    structured = draft(*rows, return_dict=True)
    assert isinstance(structured, CausalLMOutputWithPast)
    assert torch.equal(structured.logits, draft(*rows, return_dict=False))


def test_a_configuration_may_choose_the_kind_of_output(verifier_of: VerifierOf, rows: tuple[Tensor, Tensor]) -> None:
    draft = random_draft(verifier_of("llama"))
    layers = draft.config.transformer_layer_config
    layers.return_dict = False
    again = EagleSpeculator(draft.config, verifier=draft.verifier)
    assert isinstance(again.double()(*rows), Tensor)
    assert isinstance(again(*rows, return_dict=True), CausalLMOutputWithPast)


def test_a_tuple_is_not_a_cache(draft: EagleSpeculator, rows: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="such as DynamicCache, not a tuple"):
        draft(*rows, past_key_values=((rows[1], rows[1]),))


def test_without_a_verifier_the_message_says_what_to_do(verifier_of: VerifierOf, rows: tuple[Tensor, Tensor]) -> None:
    draft = random_draft(verifier_of("llama"))
    draft.detach_verifier()
    with pytest.raises(ValueError, match=r"call attach_verifier\(\)"):
        draft(*rows)
    with pytest.raises(ValueError, match=r"call attach_verifier\(\)"):
        draft.unroll(rows[0], last_only(rows[1]), rows[0], rows[0], steps=1)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", OPTIONS)
def test_only_the_draft_gets_gradients(family: str, name: str, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of(family), **OPTIONS[name])
    draft(*random_rows(BATCH, LENGTH)).logits.square().sum().backward()
    for parameter, tensor in draft.named_parameters():
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), parameter
    assert not any(weight.grad is not None for weight in verifier_of(family).parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_are_the_verifiers_head_on_the_prediction(family: str, verifier_of: VerifierOf) -> None:
    """With the scaling and the soft cap of the verifier's family."""
    verifier = verifier_of(family)
    draft = random_draft(verifier)
    hidden = 3 * random_rows(BATCH, LENGTH)[1]
    expected = verifier.lm_head(hidden)
    if family == "gemma2":
        expected = 3.0 * torch.tanh(expected / 3.0)
    torch.testing.assert_close(draft.logits(hidden), expected)
