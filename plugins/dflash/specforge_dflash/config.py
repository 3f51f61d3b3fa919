"""What the ``config.json`` of a block drafter holds: DFlash, DFlash2 and DSpark in the ``speculators`` layout."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from transformers import Qwen3Config

from specforge.config import SpeculatorModelConfig
from specforge.models.layer_config import LayerConfig

MarkovHead = Literal["vanilla", "gated", "rnn"]


class DFlashSpeculatorConfig(SpeculatorModelConfig):
    """Configuration of a DFlash draft.

    Attributes:
        transformer_layer_config: Configuration of the draft's Qwen3 layers; its ``vocab_size`` is the verifier's.
        draft_vocab_size: Number of tokens that the draft can propose.
        block_size: Number of slots of a block, the anchor's among them.
        aux_hidden_state_layer_ids: Verifier layers *before* which features are taken, ascending; None for
            ``[2, N // 2, N - 3]``.
        mask_token_id: The token that all slots but the anchor's read; an id that no text holds.
        sample_from_anchor: The anchor's slot predicts too, so that a block of K slots proposes K tokens, not K - 1.
        sliding_window_non_causal: Slots of a layer with a sliding window see their whole block, not only the slots up
            to themselves. vLLM reads it for every layer of DFlash and DFlash2.
        target_hidden_size: Width of the verifier's states; the draft's own width when None.
    """

    model_type_name: ClassVar[str] = "dflash"

    speculators_model_type: str = "dflash"
    architectures: list[str] = Field(default_factory=lambda: ["DFlashDraftModel"])
    transformer_layer_config: LayerConfig = Field(default_factory=Qwen3Config)
    draft_vocab_size: int = Field(default=32000, ge=1)
    block_size: int = Field(default=8, ge=1)
    aux_hidden_state_layer_ids: list[int] | None = None
    mask_token_id: int = Field(ge=0)
    sample_from_anchor: bool = False
    sliding_window_non_causal: bool = False
    target_hidden_size: int | None = Field(default=None, ge=1)

    @property
    def target_vocab_size(self) -> int:
        """Size of the verifier's vocabulary."""
        return int(self.transformer_layer_config.vocab_size)

    @property
    def num_aux_layers(self) -> int:
        """Number n of verifier layers that features are taken from."""
        return len(self.aux_hidden_state_layer_ids or (0, 0, 0))

    @property
    def first_slot(self) -> int:
        """The first slot that predicts a token."""
        return 0 if self.sample_from_anchor else 1

    @property
    def num_drafted(self) -> int:
        """Number S of tokens that a block proposes."""
        return self.block_size - self.first_slot

    def shortened(self, num_drafted: int) -> Self:
        """Return the configuration with blocks that propose fewer tokens."""
        return self.model_copy(update={"block_size": num_drafted + self.first_slot})

    @field_validator("aux_hidden_state_layer_ids")
    @classmethod
    def _layers_of_a_verifier(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not value or value[0] < 0 or sorted(set(value)) != value):
            raise ValueError("must be ascending ids of layers, or null for the default ones")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        layers = self.transformer_layer_config
        if layers.model_type != "qwen3":
            raise ValueError(f"transformer_layer_config.model_type is {layers.model_type!r}; block drafts have qwen3")
        if self.num_drafted < 1:
            raise ValueError(f"block_size is {self.block_size}, so that a block proposes nothing; it must be 2 or more")
        if self.draft_vocab_size > self.target_vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} exceeds the verifier's vocabulary of "
                f"{self.target_vocab_size} tokens"
            )
        if self.mask_token_id >= self.target_vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is outside the verifier's table of {self.target_vocab_size} tokens"
            )
        return self


class DFlash2SpeculatorConfig(DFlashSpeculatorConfig):
    """Configuration of a DFlash2 draft; its vocabulary is the verifier's.

    Attributes:
        conv_kernel_size: Slots that a convolution reads: its own and those before it.
        conv_group_size: Neighbouring features that share what is added to a kernel.
        selector_rank: Width of the candidate selector's codebooks.
        selector_top_k: Candidates of each slot.
    """

    model_type_name: ClassVar[str] = "dflash2"

    speculators_model_type: str = "dflash2"
    architectures: list[str] = Field(default_factory=lambda: ["DFlash2DraftModel"])
    conv_kernel_size: int = Field(default=2, ge=1)
    conv_group_size: int = Field(default=16, ge=1)
    selector_rank: int = Field(default=256, ge=1)
    selector_top_k: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _convolution_fits(self) -> Self:
        width = self.transformer_layer_config.hidden_size
        if self.conv_kernel_size > self.block_size:
            raise ValueError(f"conv_kernel_size {self.conv_kernel_size} exceeds block_size {self.block_size}")
        if width % self.conv_group_size:
            raise ValueError(f"conv_group_size {self.conv_group_size} does not divide hidden_size {width}")
        if self.draft_vocab_size != self.target_vocab_size:
            raise ValueError("draft_vocab_size must be that of the verifier: DFlash2 has no draft vocabulary")
        if self.selector_top_k > self.draft_vocab_size:
            raise ValueError(f"selector_top_k {self.selector_top_k} exceeds the vocabulary")
        return self


class DSparkSpeculatorConfig(DFlashSpeculatorConfig):
    """Configuration of a DSpark draft.

    Attributes:
        markov_rank: Width of the Markov head's embeddings.
        markov_head_type: ``"vanilla"``: the token before, embedded; ``"gated"``: times a gate that reads the slot's
            state; ``"rnn"``: a recurrence along the block.
        enable_confidence_head: Whether the draft predicts the probability that each token is accepted.
        confidence_head_with_markov: Whether that reads the token before, embedded, beside the slot's state.
        confidence_temperatures: What each slot's confidence, in log-odds, is divided by; 1 for all where none are
            given. The last validation found them.
    """

    model_type_name: ClassVar[str] = "dspark"
    proposal_fields: ClassVar[frozenset[str]] = frozenset({"confidence_temperatures"})

    speculators_model_type: str = "dspark"
    architectures: list[str] = Field(default_factory=lambda: ["DSparkDraftModel"])
    sample_from_anchor: bool = True
    markov_rank: int = Field(default=256, ge=1)
    markov_head_type: MarkovHead = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    confidence_temperatures: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)

    def shortened(self, num_drafted: int) -> Self:
        """Return the configuration with blocks that propose fewer tokens."""
        temperatures = self.confidence_temperatures[:num_drafted]
        return super().shortened(num_drafted).model_copy(update={"confidence_temperatures": temperatures})

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if len(self.confidence_temperatures) not in (0, self.num_drafted):
            raise ValueError(f"confidence_temperatures needs one for each of the {self.num_drafted} drafted tokens")
        if self.markov_head_type == "rnn" and not self.sample_from_anchor:
            raise ValueError("markov_head_type rnn needs sample_from_anchor: its recurrence begins at the anchor")
        return self
