"""The settings of block drafters' networks, under ``model.draft``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from specforge.bounds import Count, Layers, Width
from specforge_dflash.config import MarkovHead


class DFlashDraftSettings(BaseModel):
    """The draft network; its widths, heads and positions are the verifier's, and so are embeddings and head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_layers: Layers = Field(default=5, description="Number of decoder layers.")
    block_size: Layers = Field(default=8, ge=2, description="Slots of a block; the first one holds the last token.")
    intermediate_size: Width | None = Field(default=None, ge=1, description="Width of the MLPs; null: the verifier's.")
    draft_vocab_size: Count | None = Field(
        default=None, description="Most frequent tokens that the draft can propose; null: all of them."
    )
    aux_layers: list[int] | None = Field(
        default=None,
        description="Verifier layers before which features are taken, ascending; null: as many as the draft has, "
        "spread evenly.",
    )
    mask_token_id: int | None = Field(
        default=None,
        ge=0,
        description="Token in the slots to be drafted, which no text holds; null: the first id of the "
        "verifier that its tokenizer does not use.",
    )


class DFlash2DraftSettings(DFlashDraftSettings):
    """The draft network of DFlash2; it proposes any token of the verifier."""

    conv_kernel_size: Layers = Field(default=2, description="Slots that a convolution reads.")
    conv_group_size: Count = Field(default=16, description="Neighbouring features that share what adapts a kernel.")
    selector_rank: Count = Field(default=256, description="Width of the candidate selector's codebooks.")
    selector_top_k: Count = Field(default=16, ge=2, description="Candidates that the selector chooses from.")


class DSparkDraftSettings(DFlashDraftSettings):
    """The draft network of DSpark, whose first slot predicts too."""

    block_size: Layers = Field(default=7, description="Slots of a block, each of which proposes a token.")
    markov_rank: Count = Field(default=256, description="Width of the Markov head's embeddings.")
    markov_head_type: MarkovHead = Field(
        default="vanilla", description="What the token before is made into; engines other than SGLang read vanilla."
    )
    confidence_head: bool = Field(default=True, description="Learn how probable it is that each token is accepted.")
    confidence_with_markov: bool = Field(default=True, description="Let the confidence know the token before.")
