"""The building blocks of draft layers, taken from transformers by model family; plugins may register further families.

A draft layer is made of a family's own attention, feed-forward block, norm and rotary embedding, so that it computes
what a serving engine's implementation of that family computes.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
import transformers
from pydantic import AfterValidator
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from specforge.errors import UsageError, nearest_name
from specforge.hookspecs import LayerFamily
from specforge.registry import installed

# What families call the width of their feed-forward blocks, the longest text, and the heads of keys and values.
FEED_FORWARD_WIDTHS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
LENGTHS = ("max_position_embeddings", "max_sequence_length", "seq_length")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
USUAL_HEAD_DIM = 128
UNLIMITED = 2**20
# What each kind of rotary scaling needs beside its base, as transformers and engines read it alike.
_SCALED = ("factor", "original_max_position_embeddings")
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": _SCALED,
    "yarn": (*_SCALED, "beta_fast", "beta_slow", "truncate"),
    "llama3": (*_SCALED, "low_freq_factor", "high_freq_factor"),
    "longrope": (*_SCALED, "short_factor", "long_factor"),
}


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


LLAMA = Family(
    LlamaConfig,
    modeling_llama.LlamaAttention,
    modeling_llama.LlamaMLP,
    modeling_llama.LlamaRMSNorm,
    modeling_llama.LlamaRotaryEmbedding,
    modeling_llama.LlamaDecoderLayer,
)
QWEN3 = Family(
    Qwen3Config,
    modeling_qwen3.Qwen3Attention,
    modeling_qwen3.Qwen3MLP,
    modeling_qwen3.Qwen3RMSNorm,
    modeling_qwen3.Qwen3RotaryEmbedding,
    modeling_qwen3.Qwen3DecoderLayer,
)
# Model types whose layers have one position a token, and no mrope.
PLAIN = ("llama", "qwen3")


def family(name: str) -> Family:
    """Return the building blocks of a model family.

    Args:
        name: Its name, which is the model type of its configuration.

    Raises:
        UsageError: No plugin provides draft layers of that family.
    """
    found: Family = installed().load(installed().find(LayerFamily, name), "family")
    return found


def _known_family(name: str) -> str:
    try:
        installed().find(LayerFamily, name)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return name


LayerType = Annotated[str, AfterValidator(_known_family)]
"""A setting that names a family of draft layers."""


def built(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    """Build a configuration of transformers from stored values.

    Raises:
        ValueError: Transformers refuses them, in whatever way.
    """
    try:
        config = config_class(**values)
        # What is read has to be written again.
        config.to_diff_dict()
        return config
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses it as a {config_class.model_type} configuration: {reason}") from None


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
        architecture: The layer, as for ``decoder_layer``; ``"auto"`` is a layer of the verifier's own family, or a
            Llama layer where that family has none that a draft can be made of (no rotary positions, no attention,
            attention sinks, widths that differ from layer to layer). Of the verifier's own family, everything else is
            the verifier's; of another one, its widths, heads, positions and vocabulary.

    Raises:
        UsageError: There is no such layer.
    """
    source = verifier.get_text_config()
    if architecture != "auto":
        chosen = decoder_layer(architecture, source)
        return _of_own_family(source) if chosen.config is type(source) else _derived(source, chosen.config, 1)
    try:
        own = _of_own_family(source)
        with torch.device("meta"):
            decoder_layer("auto", own).build(own)
    except (UsageError, AttributeError):
        return _derived(source, LlamaConfig, num_layers=1)
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


def plain_rope(rope: Mapping[str, Any] | None, head_dim: int | None = None) -> dict[str, Any]:
    """Reduce rotary parameters to those that a layer which rotates its whole heads by one position understands.

    What other architectures add is left out: engines read ``partial_rotary_factor`` and ``mrope_section`` whatever the
    model type is, and would run another network than the one that was trained.

    Args:
        rope: Rotary parameters of any family; of several kinds of attention, those of full attention are taken.
        head_dim: Width of a head; scaling by lists of another length (of partly rotated heads) is left out.

    Returns:
        ``rope_type``, ``rope_theta``, and what the type of scaling needs; empty where nothing is given.
    """
    given = dict(rope or {})
    # A verifier with several kinds of attention keeps one set of rotary parameters a kind; a draft attends fully.
    given = dict(given.get("full_attention") or given)
    if given.get("rope_theta") is None:
        return {}
    kind = given.get("rope_type", given.get("type", "default"))
    lists = [given[name] for name in ("short_factor", "long_factor") if name in given]
    if head_dim is not None and any(2 * len(one) != head_dim for one in lists):
        kind = "default"
    names = ROPE_SCALINGS.get(kind)
    if names is None:
        kind, names = "default", ()
    known = {name: given[name] for name in ("rope_theta", *names) if given.get(name) is not None}
    return {"rope_type": kind, **known}


def start_norm(norm: nn.Module, scale: Tensor) -> None:
    """Let a norm start with a given scale, whether its family stores that as weight or as 1 + weight.

    Args:
        norm: A norm with a weight; a bias becomes 0.
        scale: What normalised states are multiplied by, [H].
    """
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.zero_()
        norm.get_parameter("weight").copy_(scale - norm_scale(norm, scale.shape[0]).to(scale))


def norm_scale(norm: nn.Module, width: int) -> Tensor:
    """Return what a norm multiplies normalised states by, [H]: of RMSNorm, LayerNorm, or one with 1 + weight.

    It is seen on a vector of zero mean and unit variance and its opposite, between which a bias cancels.

    Args:
        norm: Maps [..., H] to [..., H].
        width: Width H.
    """
    like = next(norm.parameters(), None)
    signs = torch.ones(width, dtype=None if like is None else like.dtype, device=None if like is None else like.device)
    signs[1::2] = -1
    with torch.no_grad():
        return cast(Tensor, (norm(signs) - norm(-signs)) / 2 * signs)


def _of_own_family(source: PreTrainedConfig) -> PreTrainedConfig:
    own = copy.deepcopy(source)
    own.num_hidden_layers = 1
    own.tie_word_embeddings = False
    if getattr(own, "layer_types", None):
        own.layer_types = ["full_attention"]
    elif getattr(own, "sliding_window", None):
        own.sliding_window = None
    if getattr(own, "is_heterogeneous", False):
        raise UsageError(f"the layers of {own.model_type} differ in width")
    return own


def _derived(
    source: PreTrainedConfig,
    config_class: type[PreTrainedConfig],
    num_layers: int,
    intermediate_size: int | None = None,
) -> PreTrainedConfig:
    width, attention = source.hidden_size, _attention_shape(source)
    known = {
        name: getattr(source, name)
        for name in ("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(source, name, None) is not None
    }
    if rope := plain_rope(getattr(source, "rope_parameters", None), attention["head_dim"]):
        known["rope_parameters"] = rope
    return config_class(
        **known,
        **attention,
        vocab_size=source.vocab_size,
        hidden_size=width,
        intermediate_size=intermediate_size or _first_of(source, FEED_FORWARD_WIDTHS) or 4 * width,
        # Families without a limit have no positions that could end.
        max_position_embeddings=_first_of(source, LENGTHS) or UNLIMITED,
        num_hidden_layers=num_layers,
        attention_bias=False,
        tie_word_embeddings=False,
    )


def _attention_shape(source: PreTrainedConfig) -> dict[str, int]:
    """Return number and width of heads for a draft's attention: the verifier's, those of its last layer that has some.

    A verifier without attention gets heads of the usual width.
    """
    heads = getattr(source, "num_attention_heads", None)
    if not heads:
        head_dim = math.gcd(source.hidden_size, USUAL_HEAD_DIM)
        heads = source.hidden_size // head_dim
        return {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim}
    if getattr(source, "is_heterogeneous", False):
        kinds = getattr(source, "layer_types", None) or []
        full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        source = source.per_layer_config[full[-1] if full else -1]
    key_value_heads = _first_of(source, KEY_VALUE_HEADS) or heads
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads if heads % key_value_heads == 0 else heads,
        "head_dim": getattr(source, "head_dim", None) or source.hidden_size // heads,
    }


def _first_of(source: PreTrainedConfig, names: Sequence[str]) -> int | None:
    """Return the first number that a configuration gives under some names; families call things differently."""
    given = (getattr(source, name, None) for name in names)
    return next((value for value in given if isinstance(value, int) and value > 0), None)
