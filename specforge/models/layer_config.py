"""The configuration of a draft's decoder layers, as a field of a speculator's configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, GetPydanticSchema, PlainSerializer
from transformers import CONFIG_MAPPING, PreTrainedConfig

from specforge.errors import UsageError
from specforge.models.base_components import PLAIN, built, family
from specforge.models.rope import with_settled_rope

# What every configuration of transformers has and readers of a draft want to know.
_KEPT = {"model_type"}


def _read(value: Any) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a dict or a transformers configuration")
    try:
        config_class = family(str(value.get("model_type", "llama"))).config
    except UsageError as error:
        raise ValueError(f"model_type: {error}") from None
    return built(config_class, with_settled_rope(value, PLAIN))


def _read_any(value: Any) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value.get_text_config()
    if not isinstance(value, dict):
        raise ValueError("must be a dict or a transformers configuration")
    kind = value.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {kind!r}, which transformers does not know")
    fields = {name: one for name, one in with_settled_rope(value, PLAIN).items() if name != "model_type"}
    return built(CONFIG_MAPPING[kind], fields).get_text_config()


def stored_layers(value: PreTrainedConfig) -> dict[str, Any]:
    """Return the whole configuration of layers as it is stored, without what concerns transformers only."""
    general = PreTrainedConfig().to_dict().keys() - _KEPT
    return {name: one for name, one in value.to_dict().items() if name not in general}


# Pydantic must not take transformers' configuration apart field by field.
LayerConfig = Annotated[
    PreTrainedConfig,
    GetPydanticSchema(lambda _, handler: handler(Any)),
    BeforeValidator(_read),
    PlainSerializer(stored_layers),
]
"""Read from a dict with a ``model_type`` or a transformers configuration; stored whole, without what concerns
transformers only."""

AnyLayerConfig = Annotated[
    PreTrainedConfig,
    GetPydanticSchema(lambda _, handler: handler(Any)),
    BeforeValidator(_read_any),
    PlainSerializer(stored_layers),
]
"""The same for layers of any family of transformers, not only those that are registered for drafts."""
