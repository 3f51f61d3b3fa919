"""The ``config.json`` of an MLP speculator."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from specforge.config import SpeculatorModelConfig

INPUTS = ["input_embeddings", "hidden_states[-1]"]
# Far more than anyone trains; a larger number is a mistake that would fill the memory.
MOST_HEADS = 1000
Width = Annotated[int, Field(ge=1)]


class MLPSpeculatorConfig(SpeculatorModelConfig):
    """Configuration of an MLP speculator (https://arxiv.org/abs/2404.19124).

    Each field states its name in the deployed ``mlp_speculator`` layout; ``specforge_mlp.layout`` maps one to the other
    without loss.

    Attributes:
        inputs: Inputs of the heads: their own token embeddings, and the verifier's last state after its final norm.
            Nothing else is supported; not stored in the deployed layout.
        inputs_hidden_states_normalized: Whether that state is normalised again, to length sqrt(H / 2), without weights
            (deployed: ``scale_input``).
        hidden_size: The verifier's width H (deployed: ``emb_dim``).
        intermediate_size: Width of the heads' state; 0 for ``hidden_size`` (deployed: ``inner_dim``).
        vocab_size: The verifier's number of tokens V.
        num_layers: Number of heads, the maximum number of drafted tokens (deployed: ``n_predict``).
        tie_weights: Whether all heads share embedding, norm and head, and all but the first their projection.
        top_k_tokens_per_head: Candidates of each head in ``candidate_tree``; by default 5, 4, 3, ... and at least 1.
        n_candidates: Number of paths that ``candidate_tree`` proposes.
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
            # Its name in transformers before version 5.
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
    """Return the default candidates of each head: the published 5, 4, 3, and so on down to 1."""
    return [max(1, 5 - head) for head in range(heads)]
