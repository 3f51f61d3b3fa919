"""The ``config.json`` of an EAGLE-1, EAGLE-2 or HASS checkpoint."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, GetPydanticSchema, field_serializer, field_validator, model_validator
from transformers import CONFIG_MAPPING, LlamaConfig, PreTrainedConfig

from specforge.config import SpeculatorModelConfig
from specforge.errors import UsageError, nearest_name
from specforge.models.base_components import PLAIN, DecoderLayer, built, decoder_layer
from specforge.models.rope import with_settled_rope

# Pydantic must not validate transformers' configuration field by field: the validator below checks it.
LayerConfig = Annotated[PreTrainedConfig, GetPydanticSchema(lambda _, handler: handler(Any))]


class EagleSpeculatorConfig(SpeculatorModelConfig):
    """Configuration of an EAGLE-1, EAGLE-2 or HASS draft.

    As published, EAGLE-1 (https://arxiv.org/abs/2401.15077) and EAGLE-2 (https://arxiv.org/abs/2406.16858, the same
    network under a dynamic tree) have ``layernorms=False, fusion_bias=False``, and HASS
    (https://arxiv.org/abs/2408.15766) has ``layernorms=False, fusion_bias=True``. vLLM does not support the bias.

    Attributes:
        transformer_layer_config: Configuration of the draft's decoder layer; its ``vocab_size`` is the verifier's. A
            dict with a ``model_type``, or a transformers configuration, which is copied.
        transformer_layer_architecture: Class name of a decoder layer of transformers, such as
            ``"LlamaDecoderLayer"``; ``"auto"`` for that of the configuration's family.
        layernorms: Whether there are norms on the embeddings, before the decoder layer and before the head.
        fusion_bias: Whether the fusion of embedding and feature has a bias.
    """

    model_type_name: ClassVar[str] = "eagle"

    architectures: list[str] = Field(default_factory=lambda: ["EagleSpeculator"])
    transformer_layer_config: LayerConfig = Field(default_factory=LlamaConfig)
    transformer_layer_architecture: str = "auto"
    layernorms: bool = False
    fusion_bias: bool = False

    @property
    def decoder_layer(self) -> DecoderLayer:
        """The decoder layer, with its configuration and rotary embedding."""
        return decoder_layer(self.transformer_layer_architecture, self.transformer_layer_config)

    @field_validator("transformer_layer_config", mode="before")
    @classmethod
    def validate_transformer_layer_config(cls, value: Any) -> PreTrainedConfig:
        """Copy a transformers configuration, or create one from a dict with a ``model_type``.

        Args:
            value: A configuration or a dict; of a multimodal one, the text part is used.

        Returns:
            A configuration that is equal after storing and loading.

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
            raise ValueError(f"model_type: transformers does not know {model_type!r}.{hint}")
        return _make(CONFIG_MAPPING[model_type], with_settled_rope(value, PLAIN)).get_text_config()

    @field_serializer("transformer_layer_config")
    def serialize_transformer_layer_config(self, value: PreTrainedConfig) -> dict[str, Any]:
        """Return the fields of a configuration that are not common to all of transformers, with ``model_type``."""
        return _stored(value)

    @model_validator(mode="after")
    def check_add_architectures(self) -> Self:
        """Refuse a decoder layer that transformers does not have; add a named one to the architectures.

        Returns:
            The configuration itself.

        Raises:
            ValueError: There is no such layer; the message gives the closest name.
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
    # The version that wrote it does not describe the layer.
    stored.pop("transformers_version", None)
    return stored | {"model_type": config.model_type}


def _make(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    # As an argument, the type would become an attribute that other configurations lack.
    arguments = {name: value for name, value in values.items() if name != "model_type"}
    return built(config_class, arguments)
