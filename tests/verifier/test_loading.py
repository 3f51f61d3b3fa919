from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import make
from transformers import BertConfig, LlamaConfig

from specforge.errors import UsageError
from specforge.verifier.loading import VerifierLoading, load_config, load_verifier
from specforge.verifier.names import stored_names
from specforge.verifier.parts import VerifierParts, all_names, decoder, read_tensors

ALL = ["llama", "llama-sharded", "llama-tied", "qwen3", "gemma2", "gemma3", "gemma3-images"]


@pytest.fixture
def copy(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> Path:
    shutil.copytree(tiny_verifiers["llama"].folder, tmp_path / "verifier")
    return tmp_path / "verifier"


@pytest.fixture
def sharded(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> Path:
    shutil.copytree(tiny_verifiers["llama-sharded"].folder, tmp_path / "verifier")
    return tmp_path / "verifier"


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def needed_shards(folder: Path) -> set[str]:
    return {weight_map(folder)[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}


@pytest.mark.parametrize("name", ALL)
def test_a_loaded_verifier_is_frozen_and_equals_the_saved_one(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    made = tiny_verifiers[name]
    loaded = load_verifier(str(made.folder))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.state_dict().keys() == made.model.state_dict().keys()
    for key, tensor in made.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ALL)
def test_parts_from_files_equal_those_of_the_model(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    made = tiny_verifiers[name]
    read = VerifierParts.from_pretrained(str(made.folder))
    shared = VerifierParts.of(made.model)
    tokens, states = torch.tensor([[0, 5, 60]]), torch.randn(2, 3, 16)
    for part in ("embed_tokens", "norm", "lm_head"):
        module = getattr(read, part)
        values = list(module.parameters()) + list(module.buffers())
        assert not any(value.is_meta or value.requires_grad for value in values)
        for key, tensor in getattr(shared, part).state_dict().items():
            assert torch.equal(module.state_dict()[key], tensor)
    with torch.no_grad():
        torch.testing.assert_close(read.embed_tokens(tokens), shared.embed_tokens(tokens))
        torch.testing.assert_close(read.norm(states), shared.norm(states))
        torch.testing.assert_close(read.logits(states), shared.logits(states))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("source", ["model", "files"])
def test_logits_of_the_last_state_equal_the_models(name: str, source: str, tiny_verifiers: Mapping[str, Any]) -> None:
    made = tiny_verifiers[name]
    parts = VerifierParts.of(made.model) if source == "model" else VerifierParts.from_pretrained(str(made.folder))
    last: list[torch.Tensor] = []
    handle = decoder(made.model).norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))
    with torch.no_grad():
        expected = made.model(torch.tensor([[3, 9, 27, 4]])).logits
        handle.remove()
        torch.testing.assert_close(parts.logits(last[0]), expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_a_tied_head_is_the_embedding(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    parts = VerifierParts.from_pretrained(str(tiny_verifiers[name].folder))
    assert parts.lm_head.weight.data_ptr() == parts.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_weights(dtype: Any, copy: Path) -> None:
    loading = VerifierLoading(dtype=dtype)
    expected = getattr(torch, dtype)
    assert {parameter.dtype for parameter in load_verifier(str(copy), loading).parameters()} == {expected}
    parts = VerifierParts.from_pretrained(str(copy), loading)
    assert {part.weight.dtype for part in (parts.embed_tokens, parts.norm, parts.lm_head)} == {expected}


def test_auto_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for capabilities, of_bfloat16 in (({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert VerifierLoading().torch_dtype(torch.bfloat16) == of_bfloat16
        assert VerifierLoading().torch_dtype(torch.float16) == torch.float32
        assert VerifierLoading().torch_dtype(None) == torch.float32
        assert VerifierLoading("bfloat16").torch_dtype(torch.float32) == torch.bfloat16
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert VerifierLoading().torch_dtype(torch.float16) == torch.float16
    assert VerifierLoading().torch_dtype(None) == torch.bfloat16


def test_only_the_needed_shards_are_opened(sharded: Path, tiny_verifiers: Mapping[str, Any]) -> None:
    unneeded = set(weight_map(sharded).values()) - needed_shards(sharded)
    assert len(unneeded) >= 3
    for shard in unneeded:
        (sharded / shard).unlink()
    parts = VerifierParts.from_pretrained(str(sharded))
    assert torch.equal(parts.lm_head.weight, tiny_verifiers["llama-sharded"].model.lm_head.weight)
    with pytest.raises(UsageError, match=re.escape(str(sharded))):
        load_verifier(str(sharded))


def test_a_missing_needed_shard_is_named(sharded: Path) -> None:
    shard = weight_map(sharded)["model.norm.weight"]
    (sharded / shard).unlink()
    with pytest.raises(UsageError, match=re.escape(shard)):
        VerifierParts.from_pretrained(str(sharded))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
@pytest.mark.parametrize("fixture", ["copy", "sharded"])
def test_a_damaged_file_is_named(damage: str, fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    names = ["model.safetensors"] if fixture == "copy" else sorted(needed_shards(folder))
    path = folder / names[-1]
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 400}[damage])
    with pytest.raises(UsageError, match=re.escape(str(path))):
        VerifierParts.from_pretrained(str(folder))
    with pytest.raises(UsageError, match=re.escape(str(folder))):
        load_verifier(str(folder))


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        VerifierParts.from_pretrained(str(copy))
    with pytest.raises(UsageError, match=re.escape(str(copy))):
        load_verifier(str(copy))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(name: str, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=re.escape(name)):
        VerifierParts.from_pretrained(str(copy))
    with pytest.raises(UsageError, match=re.escape(name)):
        load_verifier(str(copy))


def test_a_tensor_that_the_index_does_not_list_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        VerifierParts.from_pretrained(str(sharded))


@pytest.mark.parametrize("content", ['{"weight_map": {"model.', "{}", "[]"])
def test_a_broken_index_is_named(content: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UsageError, match=r"model\.safetensors\.index\.json"):
        VerifierParts.from_pretrained(str(sharded))


def test_a_tensor_of_another_shape_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lm_head"):
        VerifierParts.from_pretrained(str(copy))
    with pytest.raises(UsageError, match=re.escape(str(copy))):
        load_verifier(str(copy))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for read in (load_config, load_verifier, VerifierParts.from_pretrained):
        with pytest.raises(UsageError, match="nowhere"):
            read(str(tmp_path / "nowhere"))
        with pytest.raises(UsageError, match=r"config\.json"):
            read(str(tmp_path))


def test_a_model_that_is_not_a_causal_language_model_is_refused(tmp_path: Path) -> None:
    BertConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1).save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).model_type == "bert"  # transformers has a causal head for it
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "vit"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="'vit' is not a causal language model"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("content", ['{"model_type": "llama", "hidd', "", "[]", "{}", '{"model_type": "no-such-type"}'])
def test_a_broken_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        load_config(str(tmp_path))


def test_reading_a_config_touches_no_weights(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=11).save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).num_hidden_layers == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": "no"}, "'attention_bias' expected bool, got str"),
        ({"hidden_size": []}, "'hidden_size' expected int, got list"),
        ({"architectures": 3}, "architectures must be a list of class names, not 3"),
        ({"dtype": "no"}, "dtype 'no'"),
        ({"dtype": 3}, "dtype must be a torch dtype such as 'bfloat16', not 3"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000; at most 1,000"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"model_type": "lama"}, "model_type: transformers does not know 'lama'. Did you mean"),
        ({"num_key_value_heads": -1}, "num_key_value_heads must not be negative, but is -1"),
        ({"num_experts_per_tok": -1}, "num_experts_per_tok must not be negative, but is -1"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is [16, 16] in the weights, but [32, 16] according to"),
        ({"num_hidden_layers": 9}, "num_hidden_layers 9"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"pad_token_id": 10**6}, "pad_token_id 1000000"),
        ({"rope_parameters": {"rope_type": "no", "rope_theta": 1e4}}, "rope_parameters.rope_type 'no'"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(change: dict[str, Any], message: str, copy: Path) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError) as caught:
        load_verifier(str(copy))
    assert message in str(caught.value)
    assert "config.json" in str(caught.value) and str(copy) in str(caught.value)


def test_a_default_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    make("phi3, rope longrope", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["pad_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"config\.json: pad_token_id 32000 is outside the vocabulary of 96"):
        load_verifier(str(tmp_path))


def test_a_nested_key_is_named(tmp_path: Path) -> None:
    make("mistral3", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["vision_config"]["model_type"] = "no"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"config\.json: vision_config\.model_type 'no': .{,300}$"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("name", ["qwen3_5", "llama4", "mistral3"])
def test_tensors_are_found_under_their_names_in_files(name: str, tmp_path: Path) -> None:
    verifier = make(name, tmp_path)
    loaded = load_verifier(str(tmp_path))
    names = stored_names(loaded, all_names(str(tmp_path)))
    body = {id(parameter): key for key, parameter in loaded.named_parameters()}
    parts = VerifierParts.of(loaded)
    for module in (parts.embed_tokens, parts.norm, parts.lm_head):
        key = body[id(module.weight)]
        (tensor,) = read_tensors(str(tmp_path), [names[key]]).values()
        assert torch.equal(tensor.to(module.weight.dtype), module.weight), (key, names[key])
    assert torch.equal(verifier.get_input_embeddings().weight, parts.embed_tokens.weight)
