from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

from specforge.errors import UsageError
from specforge.verifier.features import capture, check_aux_layers, check_documents, packs
from specforge.verifier.parts import decoder

FAMILIES = ["llama", "llama-tied", "qwen3", "gemma2", "gemma3", "gemma3-images"]


def tokens_of(lengths: list[int], vocabulary: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


def reference_states(model: Any, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run a single document; return transformers' hidden states and the input of its final norm."""
    seen: list[Tensor] = []
    handle = decoder(model).norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        output = model(tokens[None], output_hidden_states=True, use_cache=False)
    handle.remove()
    return list(output.hidden_states), seen[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_states_equal_those_of_transformers(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    model = tiny_verifiers[name].model
    (tokens,) = tokens_of([9], model.config.get_text_config().vocab_size)
    number = model.config.get_text_config().num_hidden_layers
    layers = list(range(number + 1))
    features = capture(model, tokens[None], torch.arange(9)[None], layers)
    hidden, before_norm = reference_states(model, tokens)
    assert features.aux.shape == (1, 9, number + 1, model.config.get_text_config().hidden_size)
    for layer in range(number):
        torch.testing.assert_close(features.aux[:, :, layer], hidden[layer])
    torch.testing.assert_close(features.last, before_norm)
    torch.testing.assert_close(features.aux[:, :, number], features.last)
    # transformers' last hidden state is after the final norm; ours must not be.
    assert (features.last - hidden[-1]).abs().max() > 0.1
    torch.testing.assert_close(decoder(model).norm(features.last), hidden[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_do_not_attend_to_each_other(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    model = deepcopy(tiny_verifiers[name].model).double()
    vocabulary = model.config.get_text_config().vocab_size
    packed = [tokens_of([5, 1, 7, 2], vocabulary, 1), tokens_of([8, 7], vocabulary, 2)]
    ids = torch.stack([torch.cat(row) for row in packed])
    positions = torch.stack([torch.cat([torch.arange(len(document)) for document in row]) for row in packed])
    features = capture(model, ids, positions, [0, 2, 5])
    for row, documents in enumerate(packed):
        begin = 0
        for document in documents:
            separate = capture(model, document[None], torch.arange(len(document))[None], [0, 2, 5])
            part = slice(begin, begin + len(document))
            # Some families round to float32 inside.
            torch.testing.assert_close(features.aux[row, part], separate.aux[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(features.last[row, part], separate.last[0], rtol=1e-4, atol=1e-4)
            begin += len(document)


def number_of_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_capture_leaves_no_hook_and_no_graph(tiny_verifiers: Mapping[str, Any]) -> None:
    model = tiny_verifiers["llama"].model
    # transformers installs its own hooks on the first run.
    reference_states(model, torch.ones(3, dtype=torch.int64))
    before = number_of_hooks(model)
    features = capture(model, torch.ones(1, 3, dtype=torch.int64), torch.arange(3)[None], [1])
    assert not features.aux.requires_grad and not features.last.requires_grad
    assert number_of_hooks(model) == before
    with pytest.raises(IndexError):
        capture(model, torch.full((1, 3), 10**6), torch.arange(3)[None], [1])
    assert number_of_hooks(model) == before


@given(number=st.integers(1, 80), layers=st.lists(st.integers(-3, 90), max_size=5))
def test_only_ascending_layers_in_bounds_are_allowed(number: int, layers: list[int]) -> None:
    allowed = bool(layers) and sorted(set(layers)) == layers and layers[0] >= 0 and layers[-1] <= number
    if allowed:
        check_aux_layers(layers, number)
    else:
        with pytest.raises(UsageError, match=rf"0\.\.{number}"):
            check_aux_layers(layers, number)


def test_documents_that_would_read_each_other_run_separately(tiny_verifiers: Mapping[str, Any]) -> None:
    for made in tiny_verifiers.values():
        check_documents(made.model)
        assert packs(made.model)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "head_dim": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    verifier = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **experts)).eval()
    for parameter in verifier.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert not packs(verifier)
    with pytest.raises(UsageError, match="verifier_sharding: GptOssForCausalLM reads across the documents"):
        check_documents(verifier)
    # Includes documents of one token and padding, in two rows.
    lengths = [[3, 1, 5], [4, 2, 3]]
    tokens = torch.arange(18).view(2, 9) + 3
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in lengths])
    found = capture(verifier, tokens, positions, [0, 1])
    for row, own in enumerate(lengths):
        begin = 0
        for length in own:
            document = slice(begin, begin + length)
            separate = capture(verifier, tokens[row : row + 1, document], torch.arange(length)[None], [0, 1])
            torch.testing.assert_close(found.last[row, document], separate.last[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.aux[row, document], separate.aux[0], atol=1e-4, rtol=1e-4)
            begin += length
