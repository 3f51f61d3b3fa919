"""The decoder layer of a head: one with full attention, of the verifier's own family."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from specforge.errors import UsageError
from specforge.models.base_components import DecoderLayer
from specforge.models.draft_attention import IMPLEMENTATION
from specforge.private.transformers import set_attention
from specforge.verifier.parts import decoder, layers_of

# Settings by which the first layer of a model has experts: a verifier's first ones may be dense, its heads are not.
WITH_EXPERTS: dict[str, Any] = {"first_k_dense_replace": 0, "mlp_only_layers": [], "mlp_layer_types": ["sparse"]}


def layer_config(verifier: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of a head's decoder layer, as the only layer of a model.

    Args:
        verifier: The verifier's text configuration.
    """
    config = copy.deepcopy(verifier)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    for name, value in WITH_EXPERTS.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    return config


def blocks_of(config: PreTrainedConfig) -> DecoderLayer:
    """Return decoder layer and rotary embedding of a model with a single layer, and let its layers attend as drafts.

    Args:
        config: The model's configuration, see ``layer_config``; changed in place.

    Raises:
        UsageError: Transformers has no such model, or one that is built otherwise.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        body = decoder(model)
        layers, rotary = layers_of(body, config), body.get_submodule("rotary_emb")
    except (ValueError, AttributeError) as error:
        raise UsageError(f"no head can be built for {config.model_type!r} verifiers: {error}") from None
    if not layers:
        raise UsageError(f"no head can be built for {config.model_type!r} verifiers: no list of layers was found")
    set_attention(config, IMPLEMENTATION)
    return DecoderLayer(type(model).__name__, type(config), type(layers[0]), type(rotary))
