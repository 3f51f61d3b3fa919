"""The building blocks of draft layers, taken from transformers by model family.

A draft layer is made of a family's own attention, feed-forward block, norm and rotary embedding, so that it computes
what a serving engine's implementation of that family computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
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
    source = verifier.get_text_config()
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
    return family(model_type).config(
        **known,
        intermediate_size=intermediate_size or source.intermediate_size,
        num_hidden_layers=num_layers,
        attention_bias=False,
        tie_word_embeddings=False,
    )
