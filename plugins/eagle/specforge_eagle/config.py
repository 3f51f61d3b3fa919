"""What an EAGLE-1, EAGLE-2 or HASS checkpoint's ``config.json`` holds."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, GetPydanticSchema, field_serializer, field_validator, model_validator
from transformers import CONFIG_MAPPING, LlamaConfig, PreTrainedConfig

from specforge.config import SpeculatorModelConfig
from specforge.errors import UsageError, nearest_name
from specforge.models.base_components import PLAIN, DecoderLayer, built, decoder_layer
from specforge.models.rope import with_settled_rope

# Pydantic must not take transformers' configuration apart field by field: the validator below checks it.
LayerConfig = Annotated[PreTrainedConfig, GetPydanticSchema(lambda _, handler: handler(Any))]


class EagleSpeculatorConfig(SpeculatorModelConfig):
    """Configuration of an EAGLE-1, EAGLE-2 or HASS draft.

    As published, EAGLE-1 (https://arxiv.org/abs/2401.15077) and EAGLE-2 (https://arxiv.org/abs/2406.16858, the same
    network under a dynamic tree) have ``layernorms=False, fusion_bias=False``, and HASS
    (https://arxiv.org/abs/2408.15766) has ``layernorms=False, fusion_bias=True``. vLLM serves no bias.

    Attributes:
        transformer_layer_config: Configuration of the draft's decoder layer; its ``vocab_size`` is the verifier's. A
            dict, with a ``model_type``, or a transformers configuration, which is copied.
        transformer_layer_architecture: Class name of a decoder layer of transformers, such as
            ``"LlamaDecoderLayer"``; ``"auto"`` for that of the configuration's family.
        layernorms: Norms on the embeddings, before the decoder layer and before the head.
        fusion_bias: A bias where embedding and feature are fused.
    """

    model_type_name: ClassVar[str] = "eagle"

    architectures: list[str] = Field(default_factory=lambda: ["EagleSpeculator"])
    transformer_layer_config: LayerConfig = Field(default_factory=LlamaConfig)
    transformer_layer_architecture: str = "auto"
    layernorms: bool = False
    fusion_bias: bool = False

    @property
    def decoder_layer(self) -> DecoderLayer:
        """The decoder layer, and what goes with it."""
        return decoder_layer(self.transformer_layer_architecture, self.transformer_layer_config)

    @field_validator("transformer_layer_config", mode="before")
    @classmethod
    def validate_transformer_layer_config(cls, value: Any) -> PreTrainedConfig:
        """Copy a transformers configuration, or make one from a dict with a ``model_type``.

        Args:
            value: Either; of several modalities, what describes the text is taken.

        Returns:
            A configuration that reads back equal from what is stored.

        Raises:
            ValueError: The value is something else, or transformers refuses it.
        """
        if isinstance(value, PreTrainedConfig):
            text = value.get_text_config()
            return _make(type(text), _stored(text))
        if not isinstance(value, dict):
            raise ValueError(f"must be a dict or a transformers configuration, not a {type(value).__name__}")
        model_type = str(value.get("model_type", "llama"))
        if model_type not in CONFIG_MAPPING:
            hint = nearest_name(str(model_type), CONFIG_MAPPING.keys())
            raise ValueError(f"model_type: transformers knows no {model_type!r}.{hint}")
        return _make(CONFIG_MAPPING[model_type], with_settled_rope(value, PLAIN)).get_text_config()

    @field_serializer("transformer_layer_config")
    def serialize_transformer_layer_config(self, value: PreTrainedConfig) -> dict[str, Any]:
        """Return what a configuration says beyond what every one of transformers does, with its ``model_type``."""
        return _stored(value)

    @model_validator(mode="after")
    def check_add_architectures(self) -> Self:
        """Refuse a decoder layer that transformers does not have; list one that is named among the architectures.

        Returns:
            The configuration itself.

        Raises:
            ValueError: There is no such layer; the nearest name is given.
        """
        try:
            name = self.decoder_layer.name
        except UsageError as error:
            raise ValueError(f"transformer_layer_architecture: {error}") from None
        if self.transformer_layer_architecture != "auto" and name not in self.architectures:
            self.architectures.append(name)
        return self


def _stored(config: PreTrainedConfig) -> dict[str, Any]:
    stored: dict[str, Any] = config.to_diff_dict()
    # Who wrote it first says nothing about the layer.
    stored.pop("transformers_version", None)
    return stored | {"model_type": config.model_type}


def _make(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    # Given as an argument, the type would become an attribute that configurations made otherwise lack.
    arguments = {name: value for name, value in values.items() if name != "model_type"}
    return built(config_class, arguments)
