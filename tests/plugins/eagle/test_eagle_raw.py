"""The layout of the published EAGLE-1 heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import read, write
from random_verifiers import fill
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge_eagle.model import EagleSpeculator

LAYOUT = "eagle/eagle"
NAMES = {
    "fc.weight",
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "layers.0.post_attention_layernorm.weight",
}


def make_draft(tiny_verifiers: Mapping[str, Any], name: str = "llama", **options: Any) -> EagleSpeculator:
    draft = EagleSpeculator.from_training_args(tiny_verifiers[name].model.config, **options)
    fill(draft, seed=3)
    return draft


@pytest.fixture
def written(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> tuple[EagleSpeculator, Path]:
    draft = make_draft(tiny_verifiers)
    write(LAYOUT, draft, tmp_path / "draft")
    return draft, tmp_path / "draft"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | values))


def change_weights(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma2", "gemma3"])
def test_round_trip(name: str, tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    draft, verifier = make_draft(tiny_verifiers, name), str(tiny_verifiers[name].folder)
    write(LAYOUT, draft, tmp_path)
    again = read(LAYOUT, tmp_path, verifier)
    assert again.state_dict().keys() == draft.state_dict().keys()
    for key, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    stored = again.config.speculators_config.verifier
    assert (stored.name_or_path, stored.architectures) == (verifier, tiny_verifiers[name].model.config.architectures)
    for model in (draft, again):
        model.attach_verifier(verifier, "train_only")
    tokens, states = torch.tensor([[3, 4, 5]]), torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(tokens, states).logits, draft(tokens, states).logits)


def test_a_written_draft_is_a_plain_decoder_of_one_layer(written: tuple[EagleSpeculator, Path]) -> None:
    folder = written[1]
    assert load_file(folder / "model.safetensors").keys() == NAMES
    values = config_of(folder)
    assert values["architectures"] == ["LlamaForCausalLM"] and values["model_type"] == "llama"
    assert values["num_hidden_layers"] == 1 and values["bias"] is False and values["dtype"] == "float32"
    assert (values["vocab_size"], values["hidden_size"]) == (61, 16)
    # For transformers before version 5, and after.
    assert (values["rope_theta"], values["rope_scaling"]) == (10000.0, None)
    assert values["rope_parameters"]["rope_theta"] == 10000.0
    config = AutoConfig.from_pretrained(folder)
    assert config.num_hidden_layers == 1 and config.rope_parameters["rope_theta"] == 10000.0


def test_scaled_positions_are_written_for_old_and_new_readers(
    tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    draft = make_draft(tiny_verifiers)
    scaling = {"rope_type": "linear", "factor": 4.0}
    draft.config.transformer_layer_config.rope_parameters = {**scaling, "rope_theta": 77.0}
    write(LAYOUT, draft, tmp_path)
    values = config_of(tmp_path)
    assert (values["rope_theta"], values["rope_scaling"]) == (77.0, scaling)
    for missing in ([], ["rope_parameters"], ["rope_theta", "rope_scaling"]):
        kept = {name: value for name, value in values.items() if name not in missing}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        rope = read(LAYOUT, tmp_path, None).config.transformer_layer_config.rope_parameters
        assert rope == {**scaling, "rope_theta": 77.0}, missing


def test_a_configuration_of_the_complete_verifier_is_reduced_to_one_layer(
    tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    from specforge_eagle.config import EagleSpeculatorConfig

    config = EagleSpeculatorConfig(transformer_layer_config=tiny_verifiers["gemma3"].model.config)
    write(LAYOUT, EagleSpeculator(config), tmp_path)
    values = config_of(tmp_path)
    assert values["num_hidden_layers"] == 1 and values["layer_types"] == ["sliding_attention"]
    assert read(LAYOUT, tmp_path, None).config.transformer_layer_config.sliding_window == 4


def test_a_layer_of_another_family_is_written_under_its_family(
    tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    write(LAYOUT, make_draft(tiny_verifiers, "gemma2", transformer_layer_architecture="LlamaDecoderLayer"), tmp_path)
    values = config_of(tmp_path)
    assert (values["architectures"], values["model_type"]) == (["LlamaForCausalLM"], "llama")


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_each_reader_gets_the_bias_that_it_expects(
    value: float, tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    draft = make_draft(tiny_verifiers, fusion_bias=True)
    with torch.no_grad():
        draft.fusion_fc.bias.fill_(value)
    for reader in ("eagle", "hass", "sglang"):
        write(f"eagle/{reader}", draft, tmp_path / reader)
        assert config_of(tmp_path / reader)["bias"] is True
        assert torch.equal(read(f"eagle/{reader}", tmp_path / reader).fusion_fc.bias, draft.fusion_fc.bias)
    if value:
        with pytest.raises(UsageError, match=r"vLLM would silently ignore.*fusion_bias false.*--format sglang"):
            write("eagle/vllm", draft, tmp_path / "vllm")
        assert not (tmp_path / "vllm").exists()
    else:
        write("eagle/vllm", draft, tmp_path / "vllm")
        assert config_of(tmp_path / "vllm")["bias"] is False
        assert load_file(tmp_path / "vllm" / "model.safetensors").keys() == NAMES


def test_readers_that_always_have_a_bias_get_zeros(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    """They leave it random if the file has none."""
    for reader in ("hass", "sglang"):
        write(f"eagle/{reader}", make_draft(tiny_verifiers), tmp_path / reader)
        assert config_of(tmp_path / reader)["bias"] is True
        assert torch.equal(load_file(tmp_path / reader / "model.safetensors")["fc.bias"], torch.zeros(16))
    assert config_of(tmp_path / "sglang")["architectures"] == ["LlamaForCausalLMEagle"]
    assert config_of(tmp_path / "hass")["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
@pytest.mark.parametrize("reader", ["vllm", "sglang"])
def test_layers_that_an_engine_does_not_draft_with_are_refused(
    name: str, reader: str, tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="transformer_layer_architecture LlamaDecoderLayer"):
        write(f"eagle/{reader}", make_draft(tiny_verifiers, name), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize("stored_bias", [True, False, None])
def test_the_tensors_decide_whether_there_is_a_bias(
    stored_bias: bool | None, written: tuple[EagleSpeculator, Path]
) -> None:
    """SafeAILab's reader assumes true for a missing field, and published heads without a bias lack the field."""
    folder = written[1]
    values = {name: value for name, value in config_of(folder).items() if name != "bias"}
    (folder / "config.json").write_text(json.dumps(values if stored_bias is None else values | {"bias": stored_bias}))
    without = read(LAYOUT, folder, None)
    assert not without.config.fusion_bias and "bias" not in without.config.to_dict()["transformer_layer_config"]
    change_weights(folder, fc__bias=torch.ones(16))
    assert torch.equal(read(LAYOUT, folder, None).fusion_fc.bias, torch.ones(16))


def test_layernorms_have_no_names(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="layernorms"):
        write(LAYOUT, make_draft(tiny_verifiers, layernorms=True), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_embeddings_in_the_file_are_written_back_and_nowhere_else(
    written: tuple[EagleSpeculator, Path], tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    folder, made = written[1], tiny_verifiers["llama"]
    embeddings = made.model.model.embed_tokens.weight.detach()
    change_weights(folder, embed_tokens__weight=embeddings)
    draft = read(LAYOUT, folder, str(made.folder))
    assert draft.embed_tokens is None
    write(LAYOUT, draft, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == NAMES | {"embed_tokens.weight"} and torch.equal(again["embed_tokens.weight"], embeddings)
    draft.save_pretrained(tmp_path / "ours")
    assert "embed_tokens.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    assert SpeculatorModel.from_pretrained(tmp_path / "ours").stored_embeddings is None
    draft.to(torch.bfloat16)
    write(LAYOUT, draft, tmp_path / "short")
    assert {tensor.dtype for tensor in load_file(tmp_path / "short" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("reader", ["vllm", "sglang"])
def test_engines_get_no_embeddings_and_other_ones_are_refused(
    reader: str, written: tuple[EagleSpeculator, Path], tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    folder, made = written[1], tiny_verifiers["llama"]
    embeddings = made.model.model.embed_tokens.weight.detach()
    for value in (embeddings, embeddings + 1):
        change_weights(folder, embed_tokens__weight=value)
        draft = read(LAYOUT, folder)
        draft.attach_verifier(made.model)
        if value is embeddings:
            write(f"eagle/{reader}", draft, tmp_path / reader)
            assert "embed_tokens.weight" not in load_file(tmp_path / reader / "model.safetensors")
        else:
            with pytest.raises(UsageError, match="not the verifier's; the draft belongs to another verifier"):
                write(f"eagle/{reader}", draft, tmp_path / "other")


def test_embeddings_may_have_been_rounded(
    written: tuple[EagleSpeculator, Path], tiny_verifiers: Mapping[str, Any]
) -> None:
    folder, made = written[1], tiny_verifiers["llama"]
    change_weights(folder, embed_tokens__weight=made.model.model.embed_tokens.weight.detach().bfloat16())
    assert read(LAYOUT, folder, str(made.folder)).stored_embeddings.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [61, 50])
def test_embeddings_of_another_verifier_are_refused(
    rows: int, written: tuple[EagleSpeculator, Path], tiny_verifiers: Mapping[str, Any]
) -> None:
    folder, made = written[1], tiny_verifiers["llama"]
    change_weights(folder, embed_tokens__weight=torch.randn(rows, 16))
    with pytest.raises(UsageError, match="belongs to another verifier"):
        read(LAYOUT, folder, str(made.folder))
    read(LAYOUT, folder, None)


@pytest.mark.parametrize("name", ["layers.0.input_layernorm.weight", "layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_unknown_tensors_are_named(name: str, written: tuple[EagleSpeculator, Path]) -> None:
    change_weights(written[1], **{name.replace(".", "__"): torch.zeros(16)})
    with pytest.raises(UsageError, match=f"{written[1]} does not match EagleSpeculator: unknown: "):
        read(LAYOUT, written[1], None)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "lama"}', '{"hidden_size": "wide"}'])
def test_a_broken_config_is_named(content: str, written: tuple[EagleSpeculator, Path]) -> None:
    (written[1] / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        read(LAYOUT, written[1], None)
