"""Training multi-token-prediction heads: where they start, how many steps, and what they were worth before."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from pydantic import BaseModel, ConfigDict, Field

from specforge.bounds import Decay, Steps
from specforge.data.module import DraftDataModule
from specforge.errors import UsageError
from specforge.training.module import DraftModule
from specforge.training.optimizers import OptimizerSettings
from specforge.training.schedules import ScheduleSettings
from specforge.verifier.parts import VerifierParts
from specforge_mtp.config import MtpSpeculatorConfig
from specforge_mtp.model import MtpDraftModel
from specforge_mtp.native import check_stored, read_head
from specforge_mtp.untouched import UntouchedHead


class MtpDraftSettings(BaseModel):
    """The heads, whose network is given by the verifier."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fresh: bool = Field(
        default=False,
        description="Train a new head with random weights, for verifiers that have none, instead of the verifier's.",
    )


class MtpModule(DraftModule):
    """Trains a verifier's own multi-token-prediction heads.

    Args:
        draft: The heads.
        mtp_steps: Number of tokens that are drafted in training, by one head again and again, or by a head each.
        step_decay: Step k is weighted by this number to the power of k.
        optimizer: The optimizer.
        schedule: The learning-rate schedule.
    """

    draft: MtpDraftModel

    def __init__(
        self,
        draft: MtpDraftSettings = MtpDraftSettings(),
        mtp_steps: Steps = 3,
        step_decay: Decay = 0.6,
        optimizer: OptimizerSettings = OptimizerSettings(lr=5e-5),
        schedule: ScheduleSettings = ScheduleSettings(warmup=0.05),
        **kwargs: Any,
    ) -> None:
        super().__init__(step_decay=step_decay, optimizer=optimizer, schedule=schedule, **kwargs)
        self.settings = draft
        self.mtp_steps = mtp_steps
        heads = self._head_config().num_nextn_predict_layers
        if mtp_steps > heads > 1:
            raise UsageError(
                f"model.mtp_steps is {mtp_steps}, but {self.teacher.name} has {heads} heads, each for one step; use at "
                f"most {heads}"
            )

    @property
    def aux_layers(self) -> list[int]:
        """Empty: the heads read the verifier's last state."""
        return []

    @property
    def num_steps(self) -> int:
        """Number of tokens that are drafted."""
        return self.mtp_steps

    def setup(self, stage: str) -> None:
        """Make sure that the verifier's files hold the heads, before the verifier is loaded."""
        if self.starts_from_verifier:
            check_stored(self._head_config(), self.teacher.name, self.teacher.loading)

    @property
    def starts_from_verifier(self) -> bool:
        """Whether training starts from the verifier's own heads."""
        return not self.settings.fresh and self.init_from is None and not hasattr(self, "draft")

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> MtpDraftModel:
        """Create the heads with random weights."""
        draft = MtpDraftModel.from_training_args(
            self.teacher.config,
            verifier_name_or_path=self.teacher.stored_name,
            mtp_steps=self.mtp_steps,
            fresh=self.settings.fresh,
        )
        draft.attach_verifier(parts)
        if self.settings.fresh:
            draft.borrow_weights()
        return draft

    def adapt_draft(self) -> None:
        """Give the heads the verifier's weights, unless a stored draft has given them some."""
        if self.starts_from is None and not self.settings.fresh:
            self.draft.load_state_dict(read_head(self.draft.config, self.teacher.name, self.teacher.loading))

    def configure_callbacks(self) -> list[Callback]:
        """Return the run's callbacks, and the measurement before the first step."""
        return [*super().configure_callbacks(), UntouchedHead()]

    def _head_config(self) -> MtpSpeculatorConfig:
        return MtpSpeculatorConfig.of_verifier(self.teacher.config.get_text_config().to_dict(), self.settings.fresh)
