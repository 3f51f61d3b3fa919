"""What the ``config.json`` of a multi-token-prediction head holds, in the layout of speculators 0.9."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from specforge.config import SpeculatorModelConfig
from specforge.models.layer_config import AnyLayerConfig
from specforge_mtp.families import FAMILIES, FAMILY_OF, HeadFamily, HeadFamilyName


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

    @property
    def family(self) -> HeadFamily:
        """Names and computation of the heads."""
        by_type = FAMILY_OF.get(self.transformer_layer_config.model_type, "qwen")
        return FAMILIES[self.head_family or by_type]
