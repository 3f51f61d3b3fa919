"""Training an MLP speculator: the network's settings, supervision, and the start of stage 2."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from specforge.bounds import Decay, Layers, Width
from specforge.data.module import DraftDataModule
from specforge.errors import UsageError
from specforge.models.chain.alignment import Alignment, align
from specforge.training.module import Batch, DraftModule
from specforge.training.optimizers import OptimizerSettings
from specforge.training.schedules import ScheduleSettings
from specforge.verifier.parts import VerifierParts
from specforge_mlp.model import MLPSpeculator
from specforge_mlp.schedule import two_stage_factor
from specforge_mlp.stage_two import StageTwoSettings


class MLPDraftSettings(BaseModel):
    """The draft network; its input has the verifier's width."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_layers: Layers = Field(default=3, description="Number of heads, the maximum tokens drafted per round.")
    intermediate_size: Width = Field(default=0, description="Width of the heads' state; 0 for the verifier's width.")
    tie_weights: bool = Field(default=True, description="Share embedding, norm and head over all heads.")
    scale_input: bool = Field(default=True, description="Normalise the verifier's state before the first head.")


class MLPModule(DraftModule):
    """Trains an MLP speculator, in one stage or two.

    Args:
        draft: The draft network.
        supervision: Which tokens of the rows are trained on: those of the verifier's responses (responses), or every
            token, as published (all). Stage 2 counts the generated tokens, and validation the responses.
        stage_two: Start of stage 2 and generation in it; null trains only on the rows.
        objective: Weights of the losses, by name; text is the published hard cross-entropy.
        step_decay: Head k is weighted by this number to the power of k.
        optimizer: The optimizer.
        schedule: The learning-rate schedule; null for the published one, with a cycle for each stage.
    """

    draft: MLPSpeculator

    def __init__(
        self,
        draft: MLPDraftSettings = MLPDraftSettings(),
        supervision: Literal["responses", "all"] = "responses",
        stage_two: StageTwoSettings | None = None,
        objective: dict[str, float] = {"text": 1.0},  # noqa: B006  (shown as the default in --help)
        step_decay: Decay = 1.0,
        optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3, weight_decay=0.1),
        schedule: ScheduleSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            objective=objective,
            step_decay=step_decay,
            optimizer=optimizer,
            schedule=schedule or ScheduleSettings(),
            **kwargs,
        )
        self.settings = draft
        self.supervision = supervision
        self.stage_two = stage_two
        self.use_published_schedule = schedule is None

    @property
    def aux_layers(self) -> list[int]:
        """Empty: the draft reads the verifier's last state."""
        return []

    @property
    def num_steps(self) -> int:
        """Number of heads."""
        return self.settings.num_layers

    @property
    def reads_whole_rows(self) -> bool:
        """Whether every token of the rows is trained on."""
        return self.supervision == "all"

    @property
    def runs_verifier(self) -> bool:
        """Whether the verifier generates text, in stage 2."""
        return self.stage_two is not None

    @property
    def unestimated_costs(self) -> list[str]:
        """The decoding of stage 2."""
        stage = self.stage_two
        if stage is None:
            return []
        return [
            f"Stage 2 is counted like stage 1. The verifier's generation of up to {stage.new_tokens:,} tokens for each "
            f"prompt of {stage.prompt_length:,} is not included, unless data.stage_two provides them."
        ]

    @cached_property
    def first_step_of_stage_two(self) -> int:
        """The first optimizer step of stage 2, which must be configured."""
        assert self.stage_two is not None
        return self.stage_two.first_step(self.length.steps)

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> MLPSpeculator:
        """Create the network with random weights."""
        draft = MLPSpeculator.from_training_args(
            self.teacher.config, verifier_name_or_path=self.teacher.stored_name, **self.settings.model_dump()
        )
        draft.attach_verifier(parts)
        return draft

    def summary_text(self) -> str:
        """Return the summary, including the start of stage 2."""
        stage = self.stage_two
        if stage is None or not self.trainer.training:
            return super().summary_text()
        return (
            f"{super().summary_text()}\n"
            f"  stage 2, on the verifier's text, from step {self.first_step_of_stage_two:,} of {self.length.steps:,}"
        )

    def build_schedule(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Create the published schedule, unless another is set."""
        stage = self.stage_two
        begin = None if stage is None else stage.first_step(total_steps)
        if begin is not None and not 0 < begin < total_steps:
            raise UsageError(
                f"model.stage_two.begin: stage 2 would start at step {begin:,}, but the run has {total_steps:,} steps; "
                "start it after the first and before the last, or train longer"
            )
        if not self.use_published_schedule:
            return super().build_schedule(optimizer, total_steps)
        return LambdaLR(optimizer, lambda step: two_stage_factor(step, begin, total_steps))

    def alignment(self, batch: Batch) -> Alignment:
        """Return targets and counted positions, for the responses or for all text."""
        return align(self._supervised_tokens(batch), batch["document_ids"], self.num_steps)

    def _supervised_tokens(self, batch: Batch) -> Tensor:
        stage = self.stage_two
        in_stage_one = stage is None or self.trainer.global_step < self.first_step_of_stage_two
        if self.training and self.supervision == "all" and in_stage_one:
            return batch["document_ids"] >= 0
        return batch["loss_mask"]
