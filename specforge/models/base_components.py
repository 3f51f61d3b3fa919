"""The building blocks of draft layers, taken from transformers by model family.

A draft layer is made of a family's own attention, feed-forward block, norm and rotary embedding, so that it computes
what a serving engine's implementation of that family computes.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from specforge.errors import UsageError, nearest_name


@dataclass(frozen=True)
class Family:
    """The classes of one model family.

    Attributes:
        config: Its configuration class.
        attention: ``attention(config, layer_idx)``.
        feed_forward: ``feed_forward(config)``.
        norm: ``norm(width, eps=...)``.
        rotary: ``rotary(config)``; called with states and positions, gives cosines and sines.
        decoder_layer: ``decoder_layer(config, layer_idx)``: an ordinary layer.
    """

    config: type[PreTrainedConfig]
    attention: type[nn.Module]
    feed_forward: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]
    decoder_layer: type[nn.Module]


FAMILIES = {
    "llama": Family(
        LlamaConfig,
        modeling_llama.LlamaAttention,
        modeling_llama.LlamaMLP,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaRotaryEmbedding,
        modeling_llama.LlamaDecoderLayer,
    ),
    "qwen3": Family(
        Qwen3Config,
        modeling_qwen3.Qwen3Attention,
        modeling_qwen3.Qwen3MLP,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
        modeling_qwen3.Qwen3DecoderLayer,
    ),
}


def family(model_type: str) -> Family:
    """Return the building blocks of a model family.

    Raises:
        UsageError: Draft layers of that family are not supported.
    """
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UsageError(
            f"no draft layers of type {model_type!r}; allowed: {known}.{nearest_name(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer of any family of transformers, and what goes with it.

    Attributes:
        causal_lm: Class name of the family's causal language model.
        config: The family's configuration class.
        layer: ``layer(config, layer_idx)``: the decoder layer.
        rotary: ``rotary(config)``: the family's rotary embedding.
    """

    causal_lm: str
    config: type[PreTrainedConfig]
    layer: type[nn.Module]
    rotary: type[nn.Module]

    @property
    def name(self) -> str:
        """Class name of the layer."""
        return self.layer.__name__

    def build(self, config: PreTrainedConfig) -> nn.Module:
        """Build the layer, as the first of a model, from its own family's configuration or one that looks like it.

        Raises:
            UsageError: The configuration lacks something, or the layer does not attend as drafts do.
        """
        try:
            layer = self.layer(config, layer_idx=0)
        except (AttributeError, KeyError, TypeError) as error:
            raise UsageError(f"{self.name} cannot be built from a {config.model_type} configuration: {error}") from None
        if not hasattr(layer, "self_attn"):
            raise UsageError(f"{self.name}, as the first layer of {config.model_type}, does not attend to keys")
        if hasattr(layer.self_attn, "sinks"):
            raise UsageError(f"{self.name} attends with sinks, which drafts do not")
        return layer


def decoder_layer(architecture: str, config: PreTrainedConfig) -> DecoderLayer:
    """Find a decoder layer of transformers.

    Args:
        architecture: Its class name, such as ``"MistralDecoderLayer"``; ``"auto"`` for that of the configuration.
        config: The configuration.

    Raises:
        UsageError: There is no such layer, or it does not have the positions of a decoder layer.
    """
    if architecture == "auto":
        causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        found = _decoder_layer_of(causal_lm, _layer_names(causal_lm)) if causal_lm else None
        if found is None:
            raise UsageError(f"transformers has no decoder layer with rotary positions for {config.model_type!r}")
        return found
    owners = {layer: name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for layer in _layer_names(name)}
    found = _decoder_layer_of(owners[architecture], [architecture]) if architecture in owners else None
    if found is None:
        raise UsageError(
            f"transformers has no decoder layer {architecture!r} with rotary positions; allowed: 'auto', or a class "
            f"name such as 'LlamaDecoderLayer'.{nearest_name(architecture, owners.keys() - {architecture})}"
        )
    return found


def _layer_names(causal_lm: str) -> list[str]:
    family_name = causal_lm.removesuffix("ForCausalLM")
    # Families that read more than text name the layers that read it so.
    return [f"{family_name}DecoderLayer", f"{family_name}TextDecoderLayer"]


def _decoder_layer_of(causal_lm: str, names: Sequence[str]) -> DecoderLayer | None:
    model = getattr(transformers, causal_lm)
    module = sys.modules[model.__module__]
    for name in names:
        layer = getattr(module, name, None)
        rotary = getattr(module, f"{name.removesuffix('DecoderLayer')}RotaryEmbedding", None)
        if layer is not None and rotary is not None:
            return DecoderLayer(causal_lm, model.config_class, layer, rotary)
    return None


def rotary_options(rotary: nn.Module, config: PreTrainedConfig) -> dict[str, Any]:
    """Return what the first layer calls a rotary embedding with, beside states and positions.

    Families with several kinds of attention keep frequencies for each kind, and ask which.
    """
    asks = "layer_type" in inspect.signature(rotary.forward).parameters
    return {"layer_type": config.layer_types[0]} if asks else {}


def single_layer_config(verifier: PreTrainedConfig, architecture: str = "auto") -> PreTrainedConfig:
    """Derive the configuration of one draft layer that attends to everything.

    Args:
        verifier: The verifier's configuration.
        architecture: The layer, as for ``decoder_layer``. Of the verifier's own family, everything else is the
            verifier's; of another one, its widths, heads, positions and vocabulary.

    Raises:
        UsageError: There is no such layer.
    """
    source = verifier.get_text_config()
    chosen = decoder_layer(architecture, source)
    if chosen.config is not type(source):
        return _derived(source, chosen.config, num_layers=1)
    own = copy.deepcopy(source)
    own.num_hidden_layers = 1
    own.tie_word_embeddings = False
    if getattr(own, "layer_types", None):
        own.layer_types = ["full_attention"]
    elif getattr(own, "sliding_window", None):
        own.sliding_window = None
    return own


def draft_layer_config(
    verifier: PreTrainedConfig, model_type: str, num_layers: int, intermediate_size: int | None = None
) -> PreTrainedConfig:
    """Derive the configuration of draft layers from the verifier's: same widths, heads, positions and vocabulary.

    Args:
        verifier: The verifier's configuration.
        model_type: Family of the draft's layers.
        num_layers: Number of draft layers.
        intermediate_size: Width of their feed-forward blocks; the verifier's when None.
    """
    return _derived(verifier.get_text_config(), family(model_type).config, num_layers, intermediate_size)


def _derived(
    source: PreTrainedConfig,
    config_class: type[PreTrainedConfig],
    num_layers: int,
    intermediate_size: int | None = None,
) -> PreTrainedConfig:
    rope = dict(getattr(source, "rope_parameters", None) or {})
    # A verifier with several kinds of attention keeps one set of rotary parameters a kind; a draft attends fully.
    rope = dict(rope.get("full_attention", rope))
    copied = ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")
    known = {name: getattr(source, name) for name in copied}
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(source, name, None) is not None:
            known[name] = getattr(source, name)
    if rope:
        known["rope_parameters"] = rope
    return config_class(
        **known,
        intermediate_size=intermediate_size or source.intermediate_size,
        num_hidden_layers=num_layers,
        attention_bias=False,
        tie_word_embeddings=False,
    )
