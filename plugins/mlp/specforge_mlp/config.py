"""What an MLP speculator's ``config.json`` holds."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from specforge.config import SpeculatorModelConfig

INPUTS = ["input_embeddings", "hidden_states[-1]"]
# No one trains as many; a number beyond is a mistake that would fill the memory.
MOST_HEADS = 1000
Width = Annotated[int, Field(ge=1)]


class MLPSpeculatorConfig(SpeculatorModelConfig):
    """Configuration of an MLP speculator (https://arxiv.org/abs/2404.19124).

    Each field says what the deployed ``mlp_speculator`` layout calls it; ``specforge_mlp.layout`` maps one to the other
    without loss.

    Attributes:
        inputs: What the heads read: token embeddings of their own, and the verifier's last state, which comes after its
            final norm. Nothing else is supported; not stored in the deployed layout.
        inputs_hidden_states_normalized: Whether that state is normalised once more, to length sqrt(H / 2), without
            weights (deployed: ``scale_input``).
        hidden_size: The verifier's width H (deployed: ``emb_dim``).
        intermediate_size: Width of the heads' state; 0 for ``hidden_size`` (deployed: ``inner_dim``).
        vocab_size: The verifier's number of tokens V.
        num_layers: Number of heads, the most tokens that can be drafted (deployed: ``n_predict``).
        tie_weights: Whether all heads share embedding, norm and head, and all but the first their projection.
        top_k_tokens_per_head: Candidates of each head in ``candidate_tree``; by default 5, 4, 3, ... and at least 1.
        n_candidates: Paths that ``candidate_tree`` proposes.
    """

    model_type_name: ClassVar[str] = "mlp"
    proposal_fields: ClassVar[frozenset[str]] = frozenset({"top_k_tokens_per_head", "n_candidates"})

    architectures: list[str] = Field(default_factory=lambda: ["MLPSpeculator"])
    inputs: list[str] = Field(default_factory=lambda: list(INPUTS))
    inputs_hidden_states_normalized: bool = False
    hidden_size: int = Field(default=4096, ge=1)
    intermediate_size: int = Field(default=4096, ge=0)
    vocab_size: int = Field(default=128256, ge=1)
    num_layers: int = Field(default=5, ge=1, le=MOST_HEADS)
    tie_weights: bool = True
    top_k_tokens_per_head: list[Width] = Field(default_factory=list)
    n_candidates: int = Field(default=5, ge=1)

    @property
    def state_size(self) -> int:
        """Width of the heads' state."""
        return self.intermediate_size or self.hidden_size

    @model_validator(mode="before")
    @classmethod
    def _filled_up(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if "torch_dtype" in values:
            # What transformers called it before version 5.
            values["dtype"] = str(values.pop("torch_dtype")).removeprefix("torch.")
        heads = values.get("num_layers", cls.model_fields["num_layers"].default)
        if not values.get("top_k_tokens_per_head") and isinstance(heads, int) and heads <= MOST_HEADS:
            values["top_k_tokens_per_head"] = default_candidates(heads)
        return values

    @field_validator("inputs")
    @classmethod
    def _known_inputs(cls, value: list[str]) -> list[str]:
        if value != INPUTS:
            raise ValueError(f"must be {INPUTS}; nothing else is supported")
        return value

    @model_validator(mode="after")
    def _one_number_a_head(self) -> Self:
        if len(self.top_k_tokens_per_head) != self.num_layers:
            raise ValueError(
                f"top_k_tokens_per_head needs one number for each of the {self.num_layers} heads, not "
                f"{len(self.top_k_tokens_per_head)}"
            )
        return self


def default_candidates(heads: int) -> list[int]:
    """Return the candidates of each head where nothing is said: the published 5, 4, 3, and so on down to 1."""
    return [max(1, 5 - head) for head in range(heads)]
