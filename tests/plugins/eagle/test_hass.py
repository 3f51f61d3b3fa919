"""HASS against a slow reference: row by row as in the paper, with every key and value projected separately."""

from __future__ import annotations

import pytest
import torch
from eagle_drafts import chain_of_all
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specforge.models import EagleSpeculator
from specforge.verifier.parts import VerifierParts


def make_draft(tiny_verifiers, **options) -> EagleSpeculator:
    verifier = tiny_verifiers["llama"]
    torch.manual_seed(3)
    draft = EagleSpeculator.from_training_args(verifier.model.config, **options).double()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    draft.attach_verifier(VerifierParts.of(verifier.model))
    return draft


def harmonised_context(draft: EagleSpeculator, tokens: Tensor, true: Tensor, forwards: int) -> list[Tensor]:
    """Predictions of each forward at every row t, [L, H] each: row t reads x_{t+1} at position t.

    Forward 0 reads the true features. The queries of forward j read q^j, the predictions of forward j - 1 shifted right
    by one with the true feature in front, detached. Its keys and values at column t - d come from q^{j-d} for d < j,
    and from the true features otherwise (arXiv 2408.15766, section 3.2). The softmax is over the columns up to t.
    """
    layer, rows = draft.transformer, len(tokens) - 1
    attention = layer.self_attn
    heads, width = attention.config.num_attention_heads, attention.head_dim
    repeats = attention.num_key_value_groups
    cos, sin = draft.rotary(true[None], torch.arange(rows)[None])

    def fused(stream: Tensor, row: int) -> Tensor:
        return draft.fuse(tokens[None, row + 1 : row + 2], stream[None, row : row + 1])[0, 0]

    def rotated(states: Tensor, row: int) -> Tensor:
        states = states.view(1, -1, 1, width)
        return apply_rotary_pos_emb(states, states, cos[:, row : row + 1], sin[:, row : row + 1])[0].view(-1, width)

    streams, predictions = [true], []
    for forward in range(forwards):
        if forward:
            streams.append(torch.cat([true[:1], predictions[-1].detach()[:-1]]))
        outputs = []
        for row in range(rows):
            hidden = fused(streams[forward], row)
            query = rotated(attention.q_proj(layer.input_layernorm(hidden)), row)
            keys, values = [], []
            for column in range(row + 1):
                distance = row - column
                stream = streams[forward - distance] if distance < forward else true
                read = layer.input_layernorm(fused(stream, column))
                keys.append(rotated(attention.k_proj(read), column).repeat_interleave(repeats, dim=0))
                values.append(attention.v_proj(read).view(-1, width).repeat_interleave(repeats, dim=0))
            logits = torch.stack([(query * key).sum(-1) for key in keys]) * width**-0.5
            weights = logits.softmax(0)
            attended = sum(weight[:, None] * value for weight, value in zip(weights, values, strict=True))
            hidden = hidden + attention.o_proj(attended.reshape(heads * width))
            outputs.append(hidden + layer.mlp(layer.post_attention_layernorm(hidden)))
        predictions.append(torch.stack(outputs))
    return predictions


def text(seed: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 61, (length,), generator=generator)
    return tokens, torch.randn(length - 1, width, generator=generator, dtype=torch.float64)


def chained(draft: EagleSpeculator, tokens: Tensor, true: Tensor, forwards: int) -> Tensor:
    padded = torch.cat([true, torch.zeros_like(true[:1])])[None]
    positions = torch.arange(len(tokens))[None]
    documents = torch.zeros_like(positions)
    return chain_of_all(draft, tokens[None], padded, positions, documents, steps=forwards, detached=True)[:, 0]


@pytest.mark.parametrize("options", [{}, {"fusion_bias": True}, {"layernorms": True}])
@given(seed=st.integers(0, 999), length=st.integers(4, 9), forwards=st.integers(1, 4))
def test_predictions_are_those_of_the_harmonised_context(tiny_verifiers, options, seed, length, forwards):
    draft = make_draft(tiny_verifiers, **options)
    tokens, true = text(seed, length, 16)
    reference = harmonised_context(draft, tokens, true, forwards)
    ours = chained(draft, tokens, true, forwards)
    for forward in range(forwards):
        # Row t of forward j is step j of the chain that begins at row t - j.
        rows = length - 1 - forward
        torch.testing.assert_close(ours[forward, :rows], reference[forward][forward:], atol=1e-9, rtol=1e-7)


def test_gradients_are_summed_over_forwards_and_stop_at_what_is_fed_back(tiny_verifiers):
    tokens, true = text(5, 7, 16)
    weights = torch.randn(3, len(tokens) - 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for is_reference in (True, False):
        draft = make_draft(tiny_verifiers)
        if is_reference:
            # One backward pass after the other, as published.
            for forward, predicted in enumerate(harmonised_context(draft, tokens, true, 3)):
                (predicted[forward:] * weights[forward, forward:]).sum().backward(retain_graph=True)
        else:
            ours = chained(draft, tokens, true, 3)
            rows = len(tokens) - 1
            sum((ours[k, : rows - k] * weights[k, k:]).sum() for k in range(3)).backward()
        gradients.append({name: parameter.grad for name, parameter in draft.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-9, rtol=1e-7, msg=name)


def test_documents_of_a_packed_row_do_not_see_each_other(tiny_verifiers):
    draft = make_draft(tiny_verifiers)
    first, second = text(1, 6, 16), text(2, 5, 16)
    tokens = torch.cat([first[0], second[0]])[None]
    zero = torch.zeros(1, 16, dtype=torch.float64)
    features = torch.cat([first[1], zero, second[1], zero])[None]
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    documents = torch.tensor([[0] * 6 + [1] * 5])
    packed = chain_of_all(draft, tokens, features, positions, documents, steps=3, detached=True)[:, 0]
    for begin, (own, true) in ((0, first), (6, second)):
        separate = chained(draft, own, true, 3)
        for step in range(3):
            rows = len(own) - 1 - step
            torch.testing.assert_close(packed[step, begin : begin + rows], separate[step, :rows])
