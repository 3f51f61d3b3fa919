"""Training P-EAGLE: which rows each depth trains, and one denominator for all depths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from specforge.bounds import Decay, Layers, Portion, Steps, Width
from specforge.data.module import DraftDataModule, data_of
from specforge.errors import UsageError
from specforge.models.chain.alignment import Alignment
from specforge.private.lightning import has_trainer
from specforge.training.mask_token import check_in_table, unused_token
from specforge.training.module import Batch
from specforge.training.totals import processes
from specforge_eagle3.fused import FusedDraftModule, FusedDraftSettings
from specforge_peagle.dropping import keep_some
from specforge_peagle.model import PEagleDraftModel


class PEagleDraftSettings(FusedDraftSettings):
    """The draft network; its widths, heads and positions are the verifier's. It has embeddings of its own."""

    num_layers: Layers = Field(default=4, description="Number of decoder layers.")
    mask_token_id: Width | None = Field(
        default=None,
        description="Token that later depths read; null: the first id without a token in the tokenizer.",
    )


class PEagleModule(FusedDraftModule):
    """Trains a P-EAGLE draft.

    Args:
        draft: The draft network.
        depths: Number of tokens that one forward pass drafts.
        down_sample_ratio: Share of the rows of a depth that the next one trains.
        down_sample_ratio_min: Least share of the rows that a depth trains.
        step_decay: Weight of depth k is this to the power of k; the published loss weighs all pairs alike.
    """

    network = PEagleDraftModel
    draft: PEagleDraftModel
    settings: PEagleDraftSettings

    def __init__(
        self,
        draft: PEagleDraftSettings = PEagleDraftSettings(),
        depths: Steps = 8,
        down_sample_ratio: Portion = 0.7,
        down_sample_ratio_min: Portion = 0.2,
        step_decay: Decay = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(draft=draft, step_decay=step_decay, **kwargs)
        self.depths = depths
        self._mask_token = draft.mask_token_id or 0
        self.down_sample_ratio = down_sample_ratio
        self.down_sample_ratio_min = down_sample_ratio_min
        verifier = self.teacher.config.get_text_config()
        check_in_table(self._mask_token, verifier.vocab_size)
        if draft.mask_token_id is not None and draft.mask_token_id == verifier.pad_token_id:
            raise UsageError(
                f"model.draft.mask_token_id is {draft.mask_token_id}, the verifier's padding token, whose "
                "embedding others do not train; choose another one that no text holds"
            )

    @property
    def num_steps(self) -> int:
        """Number of depths."""
        return self.depths

    def configure_model(self) -> None:
        """Find a mask token that no text holds, load the verifier and create the draft, once."""
        if not self.teacher.is_held and has_trainer(self):
            self._mask_token = unused_token(self.settings.mask_token_id, data_of(self.trainer))
        super().configure_model()

    def network_options(self, data: DraftDataModule) -> dict[str, Any]:
        """Return the arguments of the network that only this algorithm has."""
        return {"mask_token_id": self._mask_token}

    def alignment(self, batch: Batch) -> Alignment:
        """Return targets and counted rows; in training, those that each depth trains in this optimizer step."""
        aligned = super().alignment(batch)
        if not self.training:
            return aligned
        ratio, floor = self.down_sample_ratio, self.down_sample_ratio_min
        seed = torch.initial_seed() + self.global_step
        return replace(aligned, supervised=keep_some(aligned.supervised, batch["document_ids"], ratio, floor, seed))

    def step_weights(self, supervised: Tensor) -> Tensor:
        """Return the factor of each depth's sum of losses, [S]: its decay over the pairs of all depths.

        The published loss is a mean over all pairs of row and depth: a depth weighs less because fewer rows train it.
        """
        pairs = self.step_counts(supervised).sum()
        return self.step_decays(len(supervised)) * processes() / pairs.clamp(min=1)
