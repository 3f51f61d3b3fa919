from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flash_reference import flash_attention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specforge import flash
from specforge.verifier import packed_attention
from specforge.verifier.features import capture
from specforge.verifier.loading import load_verifier
from specforge.verifier.packed_attention import IMPLEMENTATION, attend_by_documents, causal_attention

# Windows of 4 tokens slide in some layers of gemma3; in gemma2 fused attention cannot cap logits.
FAMILIES = ["llama", "llama-tied", "qwen3", "gemma3"]
AUX_LAYERS = [0, 2, 5]


def packed_rows(seed: int, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens and positions of rows of documents of these lengths."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    return torch.randint(3, 61, positions.shape, generator=torch.Generator().manual_seed(seed)), positions


@pytest.mark.parametrize("kernel", ["groups", "sequences"])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_those_of_masks_without_creating_a_mask(
    name: str, kernel: str, tiny_verifiers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_verifier(str(tiny_verifiers[name].folder)).double()
    assert model.config._attn_implementation == IMPLEMENTATION
    by_masks = deepcopy(model)
    by_masks.set_attn_implementation("sdpa")
    # Padding tokens have position 0, each a separate document.
    tokens, positions = packed_rows(1, [[14, 1, 7, 1, 1], [9, 15]])
    expected = capture(by_masks, tokens, positions, AUX_LAYERS)
    monkeypatch.setattr(packed_attention, "sdpa_mask", lambda *_, **__: pytest.fail("a mask was made"))
    if kernel == "sequences":  # those of CUDA devices
        monkeypatch.setattr(flash, "FLASH_ATTENTION", flash_attention)
        monkeypatch.setattr(flash, "has_flash", lambda _: True)
        monkeypatch.setattr(flash, "takes", lambda _: True)
        monkeypatch.setattr(packed_attention, "causal_attention", lambda *_, **__: pytest.fail("groups were attended"))
    found = capture(model, tokens, positions, AUX_LAYERS)
    torch.testing.assert_close(found.aux, expected.aux, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.last, expected.last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_attention_is_unchanged(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    loaded, saved = load_verifier(str(tiny_verifiers[name].folder)), tiny_verifiers[name].model
    tokens = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    with torch.no_grad():
        assert torch.equal(loaded(tokens, attention_mask=padded).logits, saved(tokens, attention_mask=padded).logits)
    written, expected = (
        model.generate(tokens, attention_mask=padded, max_new_tokens=8, do_sample=False) for model in (loaded, saved)
    )
    assert torch.equal(written, expected)


def test_a_family_with_other_attention_is_not_changed(tiny_verifiers: Mapping[str, Any]) -> None:
    eager = deepcopy(tiny_verifiers["llama"].model)
    eager.set_attn_implementation("eager")
    chunked = deepcopy(tiny_verifiers["llama"].model)
    chunked.config.layer_types = ["chunked_attention"] * chunked.config.num_hidden_layers
    for model in (eager, chunked):
        before = model.config._attn_implementation
        attend_by_documents(model)
        assert model.config._attn_implementation == before != IMPLEMENTATION


@given(length=st.integers(1, 23), window=st.none() | st.integers(1, 25), kv_heads=st.sampled_from([1, 2, 4]))
def test_windows_in_blocks_are_those_of_a_mask(length: int, window: int | None, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)
    )
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < (window or length))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(causal_attention(query, key, value, 0.3, window), expected)
