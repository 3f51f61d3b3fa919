"""What a draft model's ``config.json`` holds in the ``speculators`` layout."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, GetPydanticSchema, field_serializer, field_validator
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from specforge.config import SpeculatorModelConfig
from specforge.models.base_components import built
from specforge.private.transformers import builds

# Pydantic must not take transformers' configuration apart field by field: the validator below checks it.
LanguageModelConfig = Annotated[PreTrainedConfig, GetPydanticSchema(lambda _, handler: handler(Any))]


class DraftModelConfig(SpeculatorModelConfig):
    """Configuration of a draft that is a causal language model.

    Attributes:
        language_model: Its configuration in transformers. Its ``vocab_size`` is the number of the verifier's ids that
            it reads and writes, the first ones.
    """

    model_type_name: ClassVar[str] = "draft_model"

    architectures: list[str] = Field(default_factory=lambda: ["DraftModel"])
    language_model: LanguageModelConfig

    @field_validator("language_model", mode="before")
    @classmethod
    def _causal_language_model(cls, value: Any) -> Any:
        """Accept a dict with a ``model_type`` or a transformers configuration; refuse anything else."""
        if isinstance(value, dict):
            kind = value.get("model_type")
            if kind not in CONFIG_MAPPING:
                raise ValueError(f"model_type is {kind!r}, which transformers does not know")
            value = built(CONFIG_MAPPING[kind], {name: one for name, one in value.items() if name != "model_type"})
        if not isinstance(value, PreTrainedConfig):
            raise ValueError("must be a dict or a transformers configuration")
        if not builds(AutoModelForCausalLM, value):
            raise ValueError(f"model type {value.model_type!r} is not a causal language model of transformers")
        return value

    @field_serializer("language_model")
    def serialize_language_model(self, value: PreTrainedConfig) -> dict[str, Any]:
        """Store the whole configuration, without the settings that only transformers uses."""
        general = PreTrainedConfig().to_dict().keys() - {"model_type"}
        return {name: one for name, one in value.to_dict().items() if name not in general}
