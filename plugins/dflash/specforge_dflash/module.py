"""Training DFlash: anchors, one denominator for all slots, and a head that stays the verifier's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from specforge.bounds import Interval
from specforge.data.module import DraftDataModule, data_of
from specforge.errors import UsageError
from specforge.models.block.anchors import draw_anchors
from specforge.models.chain.alignment import Alignment
from specforge.private.lightning import has_trainer
from specforge.training.draft_vocabulary import check_size, chosen_vocabulary, coverage_text
from specforge.training.mask_token import check_in_table, unused_token
from specforge.training.module import Batch, DraftModule
from specforge.training.totals import processes
from specforge.verifier.features import check_aux_layers
from specforge.verifier.parts import VerifierParts
from specforge_dflash.aux_layers import spread_aux_layers
from specforge_dflash.model import DFlashDraftModel
from specforge_dflash.settings import DFlashDraftSettings


class DFlashModule(DraftModule):
    """Trains a DFlash draft.

    In each optimizer step, some response tokens of each document begin a block; validation takes all of them, so that
    its acceptance length is exact. Slot k of a block counts as step k of the chain from its anchor.

    Args:
        draft: The draft network.
        anchors: Most blocks a document in each training step; null for one at each response token.
    """

    network: ClassVar[type[DFlashDraftModel]] = DFlashDraftModel
    drafts_from_anchor: ClassVar[bool] = False
    draft: DFlashDraftModel

    def __init__(
        self, draft: DFlashDraftSettings = DFlashDraftSettings(), anchors: Interval | None = 512, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.settings = draft
        self.anchors = anchors
        verifier = self.teacher.config.get_text_config()
        chosen = draft.aux_layers or spread_aux_layers(verifier.num_hidden_layers, draft.num_layers)
        try:
            check_aux_layers(chosen, verifier.num_hidden_layers)
        except UsageError as error:
            raise UsageError(f"model.draft.aux_layers: {error}") from None
        self._aux_layers = chosen
        # Until the texts have been looked at, any will do.
        self._mask_token = draft.mask_token_id or 0
        check_in_table(self._mask_token, verifier.vocab_size)
        check_size(draft.draft_vocab_size, verifier.vocab_size)

    @property
    def aux_layers(self) -> list[int]:
        """Ids of the verifier layers that features are taken from, ascending."""
        return self._aux_layers

    @property
    def num_steps(self) -> int:
        """Number of tokens that a block proposes."""
        return self.settings.block_size - (not self.drafts_from_anchor)

    @property
    def mean_weights(self) -> list[float]:
        """Factor of each step's mean in the loss of validation: its share of all decays, as if slots were as many."""
        decays = super().mean_weights
        return [one / sum(decays) for one in decays]

    def network_fields(self) -> dict[str, Any]:
        """Return fields of the draft's configuration that only its algorithm has."""
        return {}

    def configure_model(self) -> None:
        """Check the texts, load the verifier and create the draft, once."""
        if not self.teacher.is_held and has_trainer(self):
            self.check_texts(data_of(self.trainer))
        super().configure_model()

    def check_texts(self, data: DraftDataModule) -> None:
        """Find a mask token that no text holds, and make sure that a block fits into a response.

        Args:
            data: The rows, set up.

        Raises:
            UsageError: There is no such token, or every response is too short.
        """
        self._mask_token = unused_token(self.settings.mask_token_id, data)
        longest = data.train_rows.longest_response
        if longest <= self.num_steps:
            raise UsageError(
                f"model.draft.block_size is {self.settings.block_size}, so that a block proposes {self.num_steps} "
                f"tokens, but the longest response of the training data has {longest}; they and the token before them "
                "must fit into one"
            )

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> DFlashDraftModel:
        """Create the network, at random; its final norm and its head are the verifier's."""
        settings = self.settings
        vocabulary = chosen_vocabulary(settings.draft_vocab_size, parts.config.vocab_size, data)
        draft = self.network.from_training_args(
            self.teacher.config,
            verifier_name_or_path=self.teacher.stored_name,
            num_layers=settings.num_layers,
            intermediate_size=settings.intermediate_size,
            block_size=settings.block_size,
            aux_hidden_state_layer_ids=self._aux_layers,
            mask_token_id=self._mask_token,
            sample_from_anchor=self.drafts_from_anchor,
            t2d=None if vocabulary is None else vocabulary.t2d,
            **self.network_fields(),
        )
        draft.attach_verifier(parts)
        draft.borrow_weights()
        return draft

    def summary_text(self) -> str:
        """Return the summary, with the coverage of a pruned draft vocabulary."""
        text = super().summary_text()
        return text if self.draft.draft_ids is None else f"{text}\n  {coverage_text(self.draft, data_of(self.trainer))}"

    def alignment(self, batch: Batch) -> Alignment:
        """Return targets and counted slots; in training, of the anchors that are drawn for the optimizer step."""
        aligned = super().alignment(batch)
        if not self.training or self.anchors is None:
            return aligned
        seed = torch.initial_seed() + self.global_step
        anchors = draw_anchors(aligned.supervised[0], batch["document_ids"], self.anchors, seed)
        return replace(aligned, supervised=aligned.supervised & anchors)

    def step_weights(self, supervised: Tensor) -> Tensor:
        """Return the factor of each step's sum of losses, [S]: its decay over the sum of all slots' decays."""
        decays = self.step_decays(len(supervised))
        slots = (decays * self.step_counts(supervised)).sum()
        return decays * processes() / slots.clamp(min=1)
