"""The ``config.json`` of an EAGLE-3 checkpoint."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator
from transformers import LlamaConfig

from specforge.config import SpeculatorModelConfig
from specforge.errors import UsageError
from specforge.models.layer_config import LayerConfig


class Eagle3SpeculatorConfig(SpeculatorModelConfig):
    """Configuration of an EAGLE-3 draft.

    Attributes:
        transformer_layer_config: Configuration of the draft's decoder layers; its ``vocab_size`` is the verifier's.
        draft_vocab_size: Number of tokens that the draft can propose.
        norm_before_residual: Whether the first layer's residual stream starts from the normalised feature.
        norm_before_fc: Whether an RMS norm is applied to the concatenated aux features before fusion.
        fc_norm: Whether an RMS norm is applied to each aux feature before fusion (EAGLE-3.1).
        norm_output: Whether the state after the final norm is fed back between steps (EAGLE-3.1).
        target_hidden_size: Width of the verifier's states; the draft's own width if None.
        eagle_aux_hidden_state_layer_ids: Verifier layers whose *inputs* are the features, ascending; None for
            ``[2, N // 2, N - 3]``.
        embed_requires_grad: Whether the draft has its own token embeddings, which are trained.
    """

    model_type_name: ClassVar[str] = "eagle3"

    architectures: list[str] = Field(default_factory=lambda: ["Eagle3DraftModel"])
    transformer_layer_config: LayerConfig = Field(default_factory=LlamaConfig)
    draft_vocab_size: int = Field(default=32000, ge=1)
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    target_hidden_size: int | None = Field(default=None, ge=1)
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    embed_requires_grad: bool = False

    @property
    def target_vocab_size(self) -> int:
        """Size of the verifier's vocabulary."""
        return int(self.transformer_layer_config.vocab_size)

    @property
    def num_aux_layers(self) -> int:
        """Number n of verifier layers that features are taken from."""
        return len(self.eagle_aux_hidden_state_layer_ids or (0, 0, 0))

    @field_validator("eagle_aux_hidden_state_layer_ids")
    @classmethod
    def _layers_of_a_verifier(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or value[0] < 0 or sorted(set(value)) != value):
            raise ValueError("must be ascending layer ids, or null for the default ones")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        if self.draft_vocab_size > self.target_vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} exceeds the verifier's vocabulary of "
                f"{self.target_vocab_size} tokens"
            )
        return self


def default_aux_layers(num_layers: int) -> list[int]:
    """Return the published choice of aux layers: a low, a middle and a high one.

    Args:
        num_layers: Number N of the verifier's decoder layers.

    Returns:
        ``[2, N // 2, N - 3]`` (https://arxiv.org/abs/2503.01840, section 3).

    Raises:
        UsageError: The verifier has fewer than 7 layers, so the three ids are not distinct and ascending.
    """
    chosen = [2, num_layers // 2, num_layers - 3]
    if num_layers < 7:
        example = sorted({1, num_layers // 2, num_layers - 1})
        raise UsageError(
            f"the verifier has {num_layers} decoder layers, so the default aux layers {chosen} are not three distinct "
            f"ascending ones; choose some of 0..{num_layers}, for example {example}"
        )
    return chosen
