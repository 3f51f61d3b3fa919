"""Training a draft model: what it begins with, and one batch, of the rows' text or of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specforge.bounds import Steps
from specforge.data.module import DraftDataModule
from specforge.training.module import Batch, DraftModule
from specforge.verifier.parts import VerifierParts
from specforge_draft_model.model import DraftModel
from specforge_draft_model.on_policy import OnPolicySettings, rewritten
from specforge_draft_model.start import DraftModelSettings, language_model_config, start

# What a batch holds of stored states.
STORED_STATES = ("aux", "aux_scales", "last", "last_scales")


class DraftModelModule(DraftModule):
    """Trains a language model as a draft.

    One pass over the text gives the states of all steps of a chain, and a row at step k has the state and the target
    of the next row at step k - 1: training counts each once.

    Args:
        draft: The draft network, and what it begins with.
        measured_steps: Draft steps that validation runs, for the acceptance length of chains of so many tokens.
        on_policy: Text that the draft generates during training; null trains only on the rows.
    """

    draft: DraftModel

    def __init__(
        self,
        draft: DraftModelSettings = DraftModelSettings(),
        measured_steps: Steps = 5,
        on_policy: OnPolicySettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = draft
        self.measured_steps = measured_steps
        self.on_policy = on_policy
        self._language_model = language_model_config(
            draft, self.teacher.config, self.teacher.stored_name, self.teacher.loading
        )

    @property
    def aux_layers(self) -> list[int]:
        """None: the draft reads only the text."""
        return []

    @property
    def num_steps(self) -> int:
        """One: later steps of a row are the first steps of the rows after it."""
        return 1

    @property
    def validation_steps(self) -> int:
        """Number of steps that validation runs."""
        return self.measured_steps

    @property
    def runs_verifier(self) -> bool:
        """Whether the verifier is asked about text that the draft writes."""
        return self.on_policy is not None

    @property
    def unestimated_costs(self) -> list[str]:
        """The draft decodes in some batches."""
        if self.on_policy is None:
            return []
        share, most = self.on_policy.share, self.on_policy.new_tokens
        return [f"That the draft writes up to {most:,} tokens a document, in {share:.0%} of the batches, comes on top."]

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> DraftModel:
        """Create the network, at random but for what it can borrow of the verifier's parts."""
        draft = DraftModel.from_training_args(
            self.teacher.config, self._language_model, self.teacher.stored_name, self.measured_steps
        )
        draft.attach_verifier(parts)
        if self.settings.init_model is None:
            draft.borrow_weights()
        return draft

    def adapt_draft(self) -> None:
        """Give the network the weights that it starts from, unless a stored draft has given it some."""
        if self.starts_from is None:
            start(self.draft, self.settings, self.teacher.name, self.teacher.loading)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Run one batch, in which the draft may write first."""
        number = self.trainer.fit_loop.total_batch_idx
        if self.on_policy is not None and self.on_policy.chooses(number):
            # Other text for each batch and rank, and the same again where a run is resumed.
            number = number * self.trainer.world_size + self.trainer.global_rank
            tokens = rewritten(self.draft, batch, self.on_policy, (torch.initial_seed() + number) % 2**63)
            batch = {name: one for name, one in batch.items() if name not in STORED_STATES} | {"input_ids": tokens}
        return super().training_step(batch, batch_idx)
