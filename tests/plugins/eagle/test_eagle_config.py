"""The stored configuration of an EAGLE-1 draft, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from random_verifiers import CONFIGS
from transformers import AutoConfig, Gemma3Config, LlamaConfig, MistralConfig, PreTrainedConfig

from specforge.config import SpeculatorModelConfig
from specforge.errors import UsageError
from specforge.models import EagleSpeculatorConfig as imported
from specforge_eagle.config import EagleSpeculatorConfig


def test_defaults_are_those_of_the_first_paper() -> None:
    config = EagleSpeculatorConfig()
    assert config.speculators_model_type == "eagle"
    assert config.architectures == ["EagleSpeculator"]
    assert (config.layernorms, config.fusion_bias) == (False, False)
    assert config.transformer_layer_architecture == "auto"
    assert config.transformer_layer_config == LlamaConfig()
    assert imported is EagleSpeculatorConfig


@pytest.mark.parametrize("family", CONFIGS)
def test_a_stored_configuration_reads_back_equal(family: str, tmp_path: Path) -> None:
    layers = CONFIGS[family]()
    config = EagleSpeculatorConfig(transformer_layer_config=layers, fusion_bias=True, of_another_tool={"a": [1]})
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["transformer_layer_config"]["model_type"] == layers.model_type
    assert "transformers_version" not in stored["transformer_layer_config"]
    for again in (
        EagleSpeculatorConfig.from_pretrained(tmp_path),
        SpeculatorModelConfig.from_pretrained(tmp_path),
        EagleSpeculatorConfig.from_dict(config.to_dict()),
    ):
        assert type(again) is EagleSpeculatorConfig
        assert again == config
        assert again.transformer_layer_config == layers
        assert again.to_dict() == config.to_dict() == stored


def test_only_what_differs_is_stored() -> None:
    stored = EagleSpeculatorConfig(transformer_layer_config=LlamaConfig(hidden_size=64)).to_dict()
    layers = stored["transformer_layer_config"]
    assert layers["hidden_size"] == 64
    # Fields that every configuration of transformers has, with the same value.
    assert not {"id2label", "chunk_size_feed_forward", "problem_type", "_name_or_path"} & layers.keys()


def test_a_configuration_is_copied() -> None:
    layers = LlamaConfig(hidden_size=64)
    layers._attn_implementation = "eager"
    config = EagleSpeculatorConfig(transformer_layer_config=layers)
    config.transformer_layer_config.hidden_size = 32
    assert layers.hidden_size == 64 and layers._attn_implementation == "eager"


def test_a_configuration_that_was_loaded_is_stored_without_its_origin(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    config = EagleSpeculatorConfig(transformer_layer_config=AutoConfig.from_pretrained(tmp_path))
    assert str(tmp_path) not in json.dumps(config.to_dict())
    assert EagleSpeculatorConfig.from_dict(config.to_dict()) == config


def test_the_text_part_of_a_multimodal_verifier_is_used() -> None:
    composite = Gemma3Config(text_config={"hidden_size": 64})
    assert EagleSpeculatorConfig(transformer_layer_config=composite).transformer_layer_config.hidden_size == 64
    again = EagleSpeculatorConfig(transformer_layer_config=composite.to_dict())
    assert again.transformer_layer_config.model_type == "gemma3_text"


def test_a_rotary_base_under_its_old_key_is_read() -> None:
    values = {"model_type": "llama", "rope_theta": 1234.0, "rope_scaling": None, "max_position_embeddings": 64}
    layers = EagleSpeculatorConfig(transformer_layer_config=values).transformer_layer_config
    assert layers.rope_parameters == {"rope_type": "default", "rope_theta": 1234.0}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (3, "must be a dict or a transformers configuration, not a int"),
        (None, "not a NoneType"),
        ({"model_type": "lama"}, "transformers does not know 'lama'. Did you mean 'llama'?"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}, "not a multiple"),
        ({"model_type": "gpt2"}, "no decoder layer with rotary positions for 'gpt2'"),
    ],
    ids=str,
)
def test_wrong_layers_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match="transformer_layer") as caught:
        EagleSpeculatorConfig(transformer_layer_config=layers)
    assert message in str(caught.value)
    with pytest.raises(UsageError, match="transformer_layer"):
        EagleSpeculatorConfig.from_dict({"transformer_layer_config": layers})


@pytest.mark.parametrize(
    "name",
    ["LlamaDecoderLayer", "Qwen3DecoderLayer", "MistralDecoderLayer", "Gemma2DecoderLayer", "Qwen2MoeDecoderLayer"],
)
def test_a_named_layer_is_listed_once(name: str) -> None:
    config = EagleSpeculatorConfig(transformer_layer_architecture=name)
    assert config.decoder_layer.name == name
    assert config.architectures == ["EagleSpeculator", name]
    again = EagleSpeculatorConfig.from_dict(config.to_dict())
    assert again.architectures == ["EagleSpeculator", name]
    given = ["Mine"]
    assert EagleSpeculatorConfig(transformer_layer_architecture=name, architectures=given).architectures == [
        "Mine",
        name,
    ]
    assert given == ["Mine"]


def test_a_layer_named_later_is_listed() -> None:
    config = EagleSpeculatorConfig()
    config.transformer_layer_architecture = "LlamaDecoderLayer"
    assert config.architectures == ["EagleSpeculator", "LlamaDecoderLayer"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaDecoderLayer"),
        ("qwen3", "Qwen3DecoderLayer"),
        ("mistral", "MistralDecoderLayer"),
        ("gemma2", "Gemma2DecoderLayer"),
        ("gemma3", "Gemma3DecoderLayer"),
    ],
)
def test_an_unnamed_layer_is_the_familys(family: str, name: str) -> None:
    config = EagleSpeculatorConfig(transformer_layer_config=CONFIGS[family]())
    assert config.decoder_layer.name == name
    assert config.architectures == ["EagleSpeculator"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("LamaDecoderLayer", "LlamaDecoderLayer"), ("LlamaLayer", "LlamaDecoderLayer"), ("OPTDecoderLayer", "rotary")],
)
def test_an_unknown_layer_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=f"no decoder layer '{name}'") as caught:
        EagleSpeculatorConfig(transformer_layer_architecture=name)
    assert hint in str(caught.value)


@pytest.mark.parametrize("flag", ["layernorms", "fusion_bias"])
def test_an_unknown_flag_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        EagleSpeculatorConfig.from_dict({flag: "sometimes"})


def test_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match="'eagle3', but EagleSpeculatorConfig is 'eagle'"):
        EagleSpeculatorConfig.from_dict({"speculators_model_type": "eagle3"})


@pytest.mark.parametrize("make", [dict, MistralConfig], ids=["dict", "config"])
def test_layers_can_be_replaced(make: Any) -> None:
    config = EagleSpeculatorConfig()
    config.transformer_layer_config = make(model_type="mistral") if make is dict else make()
    assert isinstance(config.transformer_layer_config, PreTrainedConfig)
    assert config.decoder_layer.name == "MistralDecoderLayer"
