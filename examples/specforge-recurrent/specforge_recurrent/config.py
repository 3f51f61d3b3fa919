"""The ``config.json`` of a recurrent draft."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from specforge.config import SpeculatorModelConfig


class RecurrentConfig(SpeculatorModelConfig):
    """Configuration of a recurrent draft.

    Attributes:
        hidden_size: The verifier's width H.
        vocab_size: Number of tokens V of the verifier.
    """

    model_type_name: ClassVar[str] = "recurrent"

    architectures: list[str] = Field(default_factory=lambda: ["RecurrentModel"])
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
