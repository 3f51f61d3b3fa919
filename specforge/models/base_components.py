"""The building blocks of draft layers, from transformers' model families; plugins may register further families.

A draft layer consists of a family's own attention, feed-forward block, norm and rotary embedding, so that it computes
the same as a serving engine's implementation of that family.
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

# Families' names for the width of feed-forward blocks, the longest text, and the number of key-value heads.
FEED_FORWARD_WIDTHS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
LENGTHS = ("max_position_embeddings", "max_sequence_length", "seq_length")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
USUAL_HEAD_DIM = 128
UNLIMITED = 2**20
# The parameters of each kind of rotary scaling besides its base, which transformers and engines read alike.
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
        config: The family's configuration class.
        attention: ``attention(config, layer_idx)``.
        feed_forward: ``feed_forward(config)``.
        norm: ``norm(width, eps=...)``.
        rotary: ``rotary(config)``; called with states and positions, returns cosines and sines.
        decoder_layer: ``decoder_layer(config, layer_idx)``: an unmodified layer.
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
# Model types whose layers have one position per token, without mrope.
PLAIN = ("llama", "qwen3")


def family(name: str) -> Family:
    """Return the building blocks of a model family.

    Args:
        name: The family's name, which is the model type of its configuration.

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
        ValueError: Transformers refuses them for any reason.
    """
    try:
        config = config_class(**values)
        # The configuration must also be writable.
        config.to_diff_dict()
        return config
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses it as a {config_class.model_type} configuration: {reason}") from None


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer of any family of transformers, with its configuration and rotary embedding.

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
        """Build the layer, as a model's first one, from its family's configuration or a compatible one.

        Raises:
            UsageError: The configuration lacks a field, or drafts do not support the layer's attention.
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
        architecture: Class name, such as ``"MistralDecoderLayer"``; ``"auto"`` for the configuration's own layer.
        config: The configuration.

    Raises:
        UsageError: There is no such layer, or it does not have rotary positions.
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
    # Multimodal families name their text layers so.
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


def own_rotary(config: PreTrainedConfig) -> nn.Module:
    """Build the rotary embedding of a configuration's own family.

    Raises:
        UsageError: The family has none under a known name.
    """
    causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
    module = sys.modules[getattr(transformers, causal_lm).__module__] if causal_lm else None
    for name in ("RotaryEmbedding", "TextRotaryEmbedding"):
        if found := getattr(module, causal_lm.removesuffix("ForCausalLM") + name, None):
            return cast(nn.Module, found(config))
    raise UsageError(f"transformers has no rotary embedding for {config.model_type!r}")


def rotary_options(rotary: nn.Module, config: PreTrainedConfig) -> dict[str, Any]:
    """Return the arguments of the first layer's rotary embedding besides states and positions.

    Families with several kinds of attention keep frequencies for each kind and take the kind as an argument.
    """
    asks = "layer_type" in inspect.signature(rotary.forward).parameters
    return {"layer_type": config.layer_types[0]} if asks else {}


def single_layer_config(verifier: PreTrainedConfig, architecture: str = "auto") -> PreTrainedConfig:
    """Derive the configuration of a draft layer with full attention.

    Args:
        verifier: The verifier's configuration.
        architecture: The layer, as for ``decoder_layer``; ``"auto"`` is a layer of the verifier's own family, or a
            Llama layer if that family has none that a draft can use (no rotary positions, no attention, attention
            sinks, widths that differ between layers). A layer of the verifier's family keeps all its other settings;
            one of another family takes the verifier's widths, heads, positions and vocabulary.

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
        intermediate_size: Width of their feed-forward blocks; the verifier's if None.
    """
    return _derived(verifier.get_text_config(), family(model_type).config, num_layers, intermediate_size)


def plain_rope(rope: Mapping[str, Any] | None, head_dim: int | None = None) -> dict[str, Any]:
    """Reduce rotary parameters to those of a layer that rotates whole heads by a single position.

    Parameters of other architectures are dropped: engines read ``partial_rotary_factor`` and ``mrope_section`` for any
    model type, and would run a different network from the trained one.

    Args:
        rope: Rotary parameters of any family; with several kinds of attention, those of full attention are used.
        head_dim: Width of a head; scaling by lists of another length (for partly rotated heads) is dropped.

    Returns:
        ``rope_type``, ``rope_theta`` and the parameters of that type; empty if none are given.
    """
    given = dict(rope or {})
    # A verifier with several kinds of attention has rotary parameters for each; a draft uses full attention.
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
    """Initialise a norm with a given scale, whether its family stores it as weight or as 1 + weight.

    Args:
        norm: A norm with a weight; a bias becomes 0.
        scale: Factors of the normalised states, [H].
    """
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.zero_()
        norm.get_parameter("weight").copy_(scale - norm_scale(norm, scale.shape[0]).to(scale))


def norm_scale(norm: nn.Module, width: int) -> Tensor:
    """Return the factors of a norm's normalised states, [H]: RMSNorm, LayerNorm, or one with 1 + weight.

    It is measured on a vector of zero mean and unit variance and its negative; a bias cancels.

    Args:
        norm: Module that maps [..., H] to [..., H].
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
        # Families without position embeddings have no maximum length.
        max_position_embeddings=_first_of(source, LENGTHS) or UNLIMITED,
        num_hidden_layers=num_layers,
        attention_bias=False,
        tie_word_embeddings=False,
    )


def _attention_shape(source: PreTrainedConfig) -> dict[str, int]:
    """Return number and width of a draft's attention heads: those of the verifier's last layer with attention.

    For a verifier without attention, heads have the usual width.
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
    """Return the first number that a configuration has under one of several names, which differ by family."""
    given = (getattr(source, name, None) for name in names)
    return next((value for value in given if isinstance(value, int) and value > 0), None)
