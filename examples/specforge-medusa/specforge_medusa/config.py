"""The ``config.json`` of a Medusa draft."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from specforge.config import SpeculatorModelConfig


class MedusaConfig(SpeculatorModelConfig):
    """Configuration of Medusa heads.

    Attributes:
        hidden_size: The verifier's width H.
        vocab_size: The verifier's number of tokens V.
        num_heads: Number K of heads, the maximum length of a drafted chain.
    """

    model_type_name: ClassVar[str] = "medusa"

    architectures: list[str] = Field(default_factory=lambda: ["MedusaModel"])
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
