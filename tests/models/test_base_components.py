"""The configuration of a draft's layers, derived from verifiers of any family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, make
from transformers import LlamaConfig

from specforge.checkpoints.verification.rules import rotation_faults
from specforge.models.base_components import draft_layer_config, norm_scale, plain_rope, single_layer_config, start_norm
from specforge.verifier.loading import load_config
from specforge_eagle.model import EagleSpeculator
from specforge_eagle3.model import Eagle3DraftModel

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (None, {}),
        ({"rope_type": "default", "rope_theta": 5.0}, {"rope_type": "default", "rope_theta": 5.0}),
        (
            {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1]},
            {"rope_type": "default", "rope_theta": 5.0},
        ),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 2.0}, YARN),
        ({"full_attention": YARN, "sliding_attention": {"rope_theta": 1.0}}, YARN),
        ({"rope_type": "proportional", "rope_theta": 7.0}, {"rope_type": "default", "rope_theta": 7.0}),
        (LONG, LONG),
        ({**LONG, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}, {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_rotary_parameters_are_reduced_to_those_of_a_plain_layer(given: Any, plain: dict[str, Any]) -> None:
    assert plain_rope(given, head_dim=8) == plain


@pytest.mark.parametrize("name", ["glm4", "phi", "stablelm", "qwen3_next", "gpt_neox", "nemotron", "qwen3_vl", "glm4v"])
def test_engines_rotate_like_the_draft(name: str, tmp_path: Any) -> None:
    """vLLM takes the rotated share of a head from the configuration, for every model type."""
    make(name, tmp_path)
    for network in (Eagle3DraftModel, EagleSpeculator):
        draft = network.from_training_args(load_config(str(tmp_path)))
        layers = draft.config.to_dict()["transformer_layer_config"]
        rope = layers["rope_parameters"]
        rotary = draft.rotary_emb if isinstance(draft, Eagle3DraftModel) else draft.rotary
        sizes = draft.config.transformer_layer_config
        head_dim = getattr(sizes, "head_dim", sizes.hidden_size // sizes.num_attention_heads)
        assert 2 * rotary.inv_freq.numel() == int(head_dim * rope.get("partial_rotary_factor", 1.0))
        assert list(rotation_faults(draft.config.to_dict())) == []


def test_an_unsupported_rotation_is_a_fault() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}

    def faults(**more: Any) -> list[str]:
        return list(rotation_faults({"transformer_layer_config": layers | {"rope_parameters": rope | more}}))

    layers = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8).to_dict()
    assert faults() == faults(partial_rotary_factor=1.0) == []
    (found,) = faults(partial_rotary_factor=0.5)
    assert "rotate 8 of 8 dimensions: engines would rotate 4" in found
    (found,) = faults(mrope_section=[1, 1, 2])
    assert "three-dimensional positions" in found
    layers["model_type"] = "no-such-type"
    (found,) = faults(partial_rotary_factor=0.5)
    assert "cannot be computed" in found
    # A head in a plain decoder's layout, with the old names.
    old = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8).to_dict() | {"partial_rotary_factor": 0.5}
    assert len(list(rotation_faults(old))) == 1


@pytest.mark.parametrize("name", ["gpt2", "gptj", "falcon", "opt", "bloom", "mamba2", "nemotron_h", "gemma4 text"])
@pytest.mark.parametrize("layer_type", ["llama", "qwen3"])
def test_sizes_come_from_every_family(name: str, layer_type: str, tmp_path: Any) -> None:
    make(name, tmp_path)
    source = load_config(str(tmp_path))
    layers = draft_layer_config(source, layer_type, 1)
    assert layers.hidden_size == 32 and layers.vocab_size == source.vocab_size
    assert layers.num_attention_heads % layers.num_key_value_heads == 0
    assert layers.head_dim % 2 == 0
    assert layers.max_position_embeddings == getattr(source, "max_position_embeddings", layers.max_position_embeddings)


@pytest.mark.parametrize("name", ["glm4", "granite", "deepseek_v3"])
def test_auto_is_a_layer_of_the_verifiers_family(name: str, tmp_path: Any) -> None:
    make(name, tmp_path)
    assert single_layer_config(load_config(str(tmp_path))).model_type == name


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "bamba", "gemma4 text", "qwen3_vl"])
def test_auto_is_a_llama_layer_if_the_family_has_none_for_drafts(name: str, tmp_path: Any) -> None:
    make(name, tmp_path)
    assert single_layer_config(load_config(str(tmp_path))).model_type == "llama"


@pytest.mark.parametrize("kind", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_a_norm_starts_at_a_scale(kind: type[torch.nn.Module]) -> None:
    norm, scale = kind(6), torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    torch.nn.init.normal_(norm.weight)
    start_norm(norm, scale)
    torch.testing.assert_close(norm_scale(norm, 6), scale, atol=1e-4, rtol=0)
    assert not any(parameter.any() for name, parameter in norm.named_parameters() if name == "bias")


def test_the_known_families() -> None:
    assert len(FAMILIES) == 66
