"""What a P-EAGLE checkpoint's ``config.json`` holds."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from specforge_eagle3.config import Eagle3SpeculatorConfig

# vLLM takes the number of tokens from its own settings; this is what peers train.
USUAL_DEPTHS = 8


class PEagleSpeculatorConfig(Eagle3SpeculatorConfig):
    """Configuration of a P-EAGLE draft.

    Attributes:
        mask_token_id: The token that is read at every depth but the first.
    """

    model_type_name: ClassVar[str] = "peagle"

    architectures: list[str] = Field(default_factory=lambda: ["PEagleDraftModel"])
    mask_token_id: int = Field(ge=0)
    embed_requires_grad: bool = True

    @property
    def num_depths(self) -> int:
        """Number K of tokens that one forward pass drafts."""
        stored = self.speculators_config
        numbers = [getattr(one, "speculative_tokens", 0) for one in stored.proposal_methods] if stored else []
        return max(numbers, default=0) or USUAL_DEPTHS

    @model_validator(mode="after")
    def _mask_token_is_embedded(self) -> Self:
        if self.mask_token_id >= self.target_vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id}, and the embeddings have {self.target_vocab_size} rows"
            )
        if self.norm_output:
            raise ValueError("norm_output has no meaning, since no state is fed back")
        return self
