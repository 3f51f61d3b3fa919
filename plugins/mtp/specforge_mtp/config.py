"""What the ``config.json`` of a multi-token-prediction head holds, in the layout of speculators 0.9."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field

from specforge.config import SpeculatorModelConfig
from specforge.models.layer_config import AnyLayerConfig
from specforge_mtp.families import FAMILIES, FAMILY_OF, HeadFamily, HeadFamilyName, family_of, stated_heads


class MtpSpeculatorConfig(SpeculatorModelConfig):
    """Configuration of the multi-token-prediction heads of a verifier.

    Attributes:
        transformer_layer_config: The verifier's text configuration, from which the heads' decoder layers are built.
        num_nextn_predict_layers: Number of heads; a single one drafts all tokens.
        head_family: Names and computation of the heads; null: that of the verifier's model type.
    """

    model_type_name: ClassVar[str] = "mtp"

    architectures: list[str] = Field(default_factory=lambda: ["MTPDraftModel"])
    transformer_layer_config: AnyLayerConfig
    num_nextn_predict_layers: int = Field(default=1, ge=1, le=100)
    head_family: HeadFamilyName | None = None

    @classmethod
    def of_verifier(cls, text: Mapping[str, Any], fresh: bool = False) -> Self:
        """Return the configuration of a verifier's heads, which names no verifier.

        Args:
            text: The verifier's text configuration.
            fresh: Whether they are new ones, in Qwen's form if the verifier's family is not known.

        Raises:
            UsageError: No family of heads is known for the verifier.
        """
        kind = str(text.get("model_type"))
        name = FAMILY_OF.get(kind, "qwen") if fresh else family_of(kind)
        read_as = FAMILIES[name].read_as or kind
        return cls(
            transformer_layer_config={**text, "model_type": read_as, "tie_word_embeddings": False},
            num_nextn_predict_layers=stated_heads(text) or 1,
            head_family=name,
        )

    @property
    def family(self) -> HeadFamily:
        """Names and computation of the heads."""
        by_type = FAMILY_OF.get(self.transformer_layer_config.model_type, "qwen")
        return FAMILIES[self.head_family or by_type]
