"""The parts that a draft borrows from its verifier, and its stored tensors."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_drafts import OPTIONS, random_draft
from random_verifiers import CONFIGS, SHAPE, random_rows, random_verifier
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedModel

from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.parts import VerifierParts
from specforge_eagle.config import EagleSpeculatorConfig
from specforge_eagle.model import EagleSpeculator

BORROWED = ("embed_tokens", "rotary_emb", "lm_head")
VerifierOf = Callable[[str], PreTrainedModel]


@pytest.fixture
def detached(verifier_of: VerifierOf) -> EagleSpeculator:
    return EagleSpeculator.from_training_args(verifier_of("llama").config)


def borrowed(draft: EagleSpeculator) -> list[nn.Module | None]:
    return [getattr(draft, name) for name in BORROWED]


def reachable_modules(*roots: Any) -> set[str]:
    """Class names of all modules that can be reached by references, except through classes and functions."""
    seen: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type) or (callable(item) and not isinstance(item, nn.Module)):
            continue
        seen[id(item)] = item
        waiting += gc.get_referents(item)
    return {type(value).__name__ for value in seen.values() if isinstance(value, nn.Module)}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("mode", ["full", "train_only", None])
def test_layers_are_shared_with_a_loaded_verifier(family: str, mode: Any, verifier_of: VerifierOf) -> None:
    verifier = verifier_of(family)
    draft = EagleSpeculator(EagleSpeculatorConfig(transformer_layer_config=verifier.config))
    assert borrowed(draft) == [None, None, None]
    assert draft.attach_verifier(verifier, mode) is verifier
    assert borrowed(draft) == [verifier.model.embed_tokens, verifier.model.rotary_emb, verifier.lm_head]
    assert draft.embed_tokens.weight.data_ptr() == verifier.get_input_embeddings().weight.data_ptr()
    assert (draft.verifier is verifier) == (mode != "train_only")
    draft.detach_verifier()
    assert borrowed(draft) == [None, None, None] and draft.verifier is None


def test_the_mode_can_be_given_to_the_constructor(verifier_of: VerifierOf, tiny_verifiers: Mapping[str, Any]) -> None:
    verifier = verifier_of("llama")
    config = EagleSpeculatorConfig(transformer_layer_config=verifier.config)
    assert EagleSpeculator(config, verifier).verifier is verifier
    assert EagleSpeculator(config, verifier, "full").verifier is verifier
    assert borrowed(EagleSpeculator(config, verifier, "detached")) == [None, None, None]
    few = EagleSpeculator(config, verifier, "train_only")
    assert few.verifier is None and few.lm_head is verifier.lm_head
    made = tiny_verifiers["llama"]
    from_folder = EagleSpeculator(EagleSpeculatorConfig(transformer_layer_config=made.model.config), made.folder)
    assert torch.equal(from_folder.lm_head.weight, made.model.lm_head.weight)
    assert from_folder.verifier is not None


@pytest.mark.parametrize("name", ["llama", "llama-sharded", "llama-tied", "qwen3", "gemma2", "gemma3"])
def test_from_files_only_what_is_needed_is_read(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    made = tiny_verifiers[name]
    draft = EagleSpeculator.from_training_args(made.model.config)
    parts = draft.attach_verifier(made.folder, "train_only")
    assert isinstance(parts, VerifierParts)
    assert draft.verifier is None and None not in borrowed(draft)
    assert not any(weight.requires_grad for weight in (draft.embed_tokens.weight, draft.lm_head.weight))
    rows = random_rows(2, 5)
    separate = draft(rows[0], rows[1].float()).logits
    draft.attach_verifier(made.model)
    torch.testing.assert_close(draft(rows[0], rows[1].float()).logits, separate)


def test_train_only_holds_no_decoder_layers(verifier_of: VerifierOf, detached: EagleSpeculator) -> None:
    detached.attach_verifier(verifier_of("qwen3"))
    assert "Qwen3DecoderLayer" in reachable_modules(detached)
    detached.attach_verifier(verifier_of("qwen3"), "train_only")
    assert not {"Qwen3DecoderLayer", "Qwen3ForCausalLM"} & reachable_modules(detached)
    assert {"Qwen3RotaryEmbedding", "Qwen3RMSNorm"} <= reachable_modules(detached)


def test_train_only_cannot_generate(verifier_of: VerifierOf, detached: EagleSpeculator) -> None:
    detached.attach_verifier(verifier_of("llama"), "train_only")
    with pytest.raises(ValueError, match="needs the whole verifier; call attach_verifier"):
        detached.generate(torch.tensor([[4, 9]]))


@pytest.mark.parametrize("mode", ["full", "train_only"])
def test_detaching_releases_the_verifier(mode: Any, detached: EagleSpeculator) -> None:
    verifier = random_verifier("llama")
    detached.double().attach_verifier(verifier, mode)
    detached(*random_rows(1, 3))
    watched = [weakref.ref(part) for part in (verifier, verifier.model.rotary_emb, verifier.lm_head.weight)]
    detached.detach_verifier()
    del verifier
    gc.collect()
    assert [reference() for reference in watched] == [None, None, None]


def test_attaching_another_releases_the_first(verifier_of: VerifierOf, detached: EagleSpeculator) -> None:
    first = random_verifier("llama")
    detached.attach_verifier(first)
    detached.attach_verifier(verifier_of("qwen3"))
    watched = weakref.ref(first)
    del first
    gc.collect()
    assert watched() is None
    assert detached.lm_head is verifier_of("qwen3").lm_head


@pytest.mark.parametrize("mode", ["full", "train_only"])
def test_borrowed_parts_are_not_part_of_the_draft(
    mode: Any, verifier_of: VerifierOf, detached: EagleSpeculator, tmp_path: Path
) -> None:
    verifier = verifier_of("llama")
    names = detached.state_dict().keys()
    detached.attach_verifier(verifier, mode)
    theirs = {id(module) for module in verifier.modules()} | {id(parameter) for parameter in verifier.parameters()}
    assert not theirs & {id(part) for part in (*detached.modules(), *detached.parameters(), *detached.buffers())}
    assert detached.state_dict().keys() == names
    detached.to(torch.bfloat16).requires_grad_(True)
    assert {parameter.dtype for parameter in verifier.parameters()} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in verifier.parameters())
    detached.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == names
    detached.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_an_unknown_mode_is_refused(verifier_of: VerifierOf, detached: EagleSpeculator) -> None:
    with pytest.raises(ValueError, match="mode 'train' is not one of: 'full', 'train_only'"):
        detached.attach_verifier(verifier_of("llama"), "train")
    assert borrowed(detached) == [None, None, None]


def test_a_verifier_of_another_width_is_refused(detached: EagleSpeculator, tiny_verifiers: Mapping[str, Any]) -> None:
    wide = EagleSpeculator(EagleSpeculatorConfig(transformer_layer_config=LlamaConfig(**{**SHAPE, "hidden_size": 32})))
    with pytest.raises(UsageError, match="a width of 32; this one has 16"):
        wide.attach_verifier(tiny_verifiers["llama"].folder, "train_only")
    assert borrowed(wide) == [None, None, None]


def test_a_missing_verifier_is_named(detached: EagleSpeculator, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing-here"):
        detached.attach_verifier(tmp_path / "nothing-here")


ATTENTION = [f"transformer.self_attn.{name}_proj.weight" for name in "qkvo"]
FEED_FORWARD = [f"transformer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
PLAIN = {"fusion_fc.weight", *ATTENTION, *FEED_FORWARD, "transformer.post_attention_layernorm.weight"}
NORMS = {
    "embedding_layernorm.weight",
    "transformer.input_layernorm.weight",
    "pre_lm_head_layernorm.weight",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tensors_are_those_of_the_layout(name: str, verifier_of: VerifierOf) -> None:
    options = OPTIONS[name]
    state = random_draft(verifier_of("llama"), **options).state_dict()
    expected = PLAIN | (NORMS if options.get("layernorms") else set())
    expected |= {"fusion_fc.bias"} if options.get("fusion_bias") else set()
    assert state.keys() == expected
    assert state["fusion_fc.weight"].shape == (16, 32)
    assert state["transformer.self_attn.q_proj.weight"].shape == (32, 16)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", OPTIONS)
def test_round_trip(family: str, name: str, verifier_of: VerifierOf, tmp_path: Path) -> None:
    draft = random_draft(verifier_of(family), **OPTIONS[name])
    draft.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["dtype"] == "float64" and stored["architectures"] == ["EagleSpeculator"]
    again = SpeculatorModel.from_pretrained(tmp_path, verifier=verifier_of(family))
    assert type(again) is EagleSpeculator
    assert again.config == draft.config
    rows = random_rows(2, 6)
    torch.testing.assert_close(again(*rows).logits, draft(*rows).logits, atol=1e-6, rtol=1e-5)


def test_a_named_layer_is_listed_again_when_it_is_read(verifier_of: VerifierOf, tmp_path: Path) -> None:
    draft = random_draft(verifier_of("gemma2"), transformer_layer_architecture="LlamaDecoderLayer")
    draft.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["EagleSpeculator"]
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert again.config.architectures == draft.config.architectures == ["EagleSpeculator", "LlamaDecoderLayer"]


def test_loading_attaches_the_requested_verifier(
    verifier_of: VerifierOf, detached: EagleSpeculator, tmp_path: Path
) -> None:
    detached.save_pretrained(tmp_path)
    verifier = verifier_of("llama")
    load = EagleSpeculator.from_pretrained
    assert load(tmp_path).lm_head is None
    assert load(tmp_path, verifier=verifier, verifier_attachment_mode="detached").lm_head is None
    assert load(tmp_path, verifier=verifier).verifier is verifier
    few = load(tmp_path, verifier=verifier, verifier_attachment_mode="train_only")
    assert few.verifier is None and few.lm_head is verifier.lm_head


def test_casting_on_load_leaves_the_rotary_frequencies(detached: EagleSpeculator, tmp_path: Path) -> None:
    detached.save_pretrained(tmp_path)
    again = EagleSpeculator.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.rotary.inv_freq, detached.rotary.inv_freq)
    assert again.rotary.inv_freq.dtype == torch.float32


def test_a_draft_and_a_verifier_in_different_short_dtypes(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), layernorms=True).to(torch.bfloat16)
    draft.reset_constants()
    rows = random_rows(2, 6)
    output = draft(*rows, output_hidden_states=True)
    assert output.logits.dtype == torch.float64 and output.hidden_states[-1].dtype == torch.bfloat16


def test_from_training_args(tiny_verifiers: Mapping[str, Any]) -> None:
    verifier = tiny_verifiers["llama"].model.config
    draft = EagleSpeculator.from_training_args(
        verifier,
        layernorms=True,
        fusion_bias=True,
        transformer_layer_architecture="Qwen3DecoderLayer",
        verifier_name_or_path="owner/name",
        speculative_tokens=4,
        unknown=1,
    )
    config = draft.config
    assert (config.layernorms, config.fusion_bias) == (True, True)
    assert config.transformer_layer_architecture == "Qwen3DecoderLayer"
    layers = config.transformer_layer_config
    assert (layers.model_type, layers.num_hidden_layers) == ("qwen3", 1)
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(layers, name) == getattr(verifier, name)
    stored = config.speculators_config
    assert (stored.algorithm, stored.default_proposal_method) == ("eagle", "greedy")
    assert [proposal_method.speculative_tokens for proposal_method in stored.proposal_methods] == [4]
    assert (stored.verifier.name_or_path, stored.verifier.architectures) == ("owner/name", ["LlamaForCausalLM"])
    assert EagleSpeculator.get_trainer_kwargs(anything=1) == ({}, {})


@pytest.mark.parametrize("family", CONFIGS)
def test_by_default_the_layer_is_the_verifiers_own_without_a_window(family: str, verifier_of: VerifierOf) -> None:
    verifier = verifier_of(family)
    before = verifier.config.to_dict()
    draft = EagleSpeculator.from_training_args(verifier.config)
    assert type(draft.transformer) is type(verifier.model.layers[0])
    layers = draft.config.transformer_layer_config
    assert layers.num_hidden_layers == 1 and not layers.tie_word_embeddings
    assert getattr(layers, "layer_types", ["full_attention"]) == ["full_attention"]
    assert verifier.config.to_dict() == before
    assert verifier.config._attn_implementation != "specforge_draft"


@pytest.mark.parametrize("name", ["LlamaDecoderLayer", "MistralDecoderLayer", "Gemma2DecoderLayer"])
@pytest.mark.parametrize("family", CONFIGS)
def test_any_layer_can_draft_for_any_verifier(name: str, family: str, verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of(family), transformer_layer_architecture=name)
    assert type(draft.transformer).__name__ == name
    assert draft(*random_rows(1, 5)).logits.isfinite().all()


def test_experts_start_at_random_too() -> None:
    """Weights of other shapes than a linear layer's must not stay uninitialised."""
    layers = MixtralConfig(**SHAPE, num_local_experts=3, initializer_range=0.1)
    draft = EagleSpeculator.from_training_args(layers, fusion_bias=True)
    experts = [parameter for parameter in draft.parameters() if parameter.ndim == 3]
    assert experts and all(0.05 < expert.std().item() < 0.15 for expert in experts)
    assert not draft.fusion_fc.bias.any()


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ({"model_type": "qwen3"}, {"transformer_layer_architecture": "LlamaDecoderLayer"}, "mlp_bias"),
        ({"model_type": "gpt_oss"}, {}, "sinks"),
        ({"model_type": "qwen3_next"}, {}, "does not attend"),
        ({"model_type": "olmo2"}, {"layernorms": True}, "no norm before its attention"),
    ],
    ids=str,
)
def test_layers_that_cannot_draft_are_refused(layers: Any, options: Any, message: str) -> None:
    small = {**SHAPE, **layers}
    config = EagleSpeculatorConfig(transformer_layer_config=small, **options)
    with pytest.raises(UsageError, match=message):
        EagleSpeculator(config)


@pytest.mark.parametrize("flag", ["layernorms", "fusion_bias"])
def test_every_option_matters(flag: str, verifier_of: VerifierOf) -> None:
    plain, other = random_draft(verifier_of("llama")), random_draft(verifier_of("llama"), **{flag: True})
    other.load_state_dict({**other.state_dict(), **plain.state_dict()})
    rows = random_rows(1, 5)
    assert (plain(*rows).logits - other(*rows).logits).abs().max() > 1e-2


def test_a_cap_of_the_attentions_logits_is_not_the_drafts(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("gemma2")
    assert verifier.config.attn_logit_softcapping == 50.0
    draft = random_draft(verifier)
    assert draft.transformer.self_attn.attn_logit_softcapping is None
    assert draft.config.transformer_layer_config.attn_logit_softcapping == 50.0
