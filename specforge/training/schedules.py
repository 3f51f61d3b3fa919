"""Learning-rate schedules: a linear warmup, then cosine, linear, constant or warmup-stable-decay; or any class."""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from specforge.bounds import Amount, Portion
from specforge.training.class_paths import build, check_arguments, class_at, takes

OWN = ("cosine", "linear", "constant", "wsd")
# Names that torch's schedules use for their total number of steps.
SPANS = ("total_steps", "T_max", "total_iters")


class ScheduleSettings(BaseModel):
    """Settings of the learning-rate schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        default="cosine",
        description="Schedule after the warmup: cosine, linear, constant, or wsd, which stays at the peak and decays "
        "linearly at the end; or the class path of a schedule, such as torch.optim.lr_scheduler.OneCycleLR, which uses "
        "only its options.",
    )
    warmup: Amount = Field(
        default=0.015, description="Length of the linear warmup: a share of all steps if below 1, otherwise steps."
    )
    final_ratio: Portion = Field(default=0.0, description="Learning rate at the end, as a share of the peak.")
    decay_share: Portion = Field(default=0.2, gt=0, description="Share of all steps over which wsd decays.")
    options: dict[str, Any] = Field(
        default={},
        description="Arguments of a schedule given by class path; total_steps, T_max or total_iters is the length of "
        "the run unless given.",
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in OWN:
            class_at(name, LRScheduler, OWN)
        return name

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.name not in OWN:
            check_arguments(self.name, self.schedule_class, self.arguments(total_steps=1))
        elif self.options:
            raise ValueError(f"options are for a schedule given by its class path; {self.name} has none")
        return self

    @property
    def schedule_class(self) -> type[LRScheduler]:
        """The class at the path ``name``."""
        return class_at(self.name, LRScheduler, OWN)

    def arguments(self, total_steps: int) -> dict[str, Any]:
        """Return the arguments of the class besides the optimizer.

        Args:
            total_steps: Number of optimizer steps in the whole run.
        """
        return {name: total_steps for name in SPANS if takes(self.schedule_class, name)} | self.options


def build_schedule(optimizer: Optimizer, settings: ScheduleSettings, total_steps: int) -> LRScheduler:
    """Create the schedule of a run.

    Args:
        optimizer: The optimizer; its learning rates are the peaks.
        settings: Shape of the schedule.
        total_steps: Number of optimizer steps in the whole run.
    """
    if settings.name not in OWN:
        return build("model.schedule", settings.schedule_class, optimizer, settings.arguments(total_steps))
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings, total_steps))


def learning_rate_factor(step: int, settings: ScheduleSettings, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, as a share of the peak."""
    warmup = settings.warmup if settings.warmup >= 1 else round(settings.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.name == "constant":
        return 1.0
    begin = warmup
    if settings.name == "wsd":
        # At least one step decays, so that a short run also ends at the final ratio.
        begin = max(warmup, min(total_steps * (1 - settings.decay_share), total_steps - 1))
    progress = min(1.0, max(0.0, (step - begin) / max(1.0, total_steps - begin)))
    shape = (1 + math.cos(math.pi * progress)) / 2 if settings.name == "cosine" else 1 - progress
    return settings.final_ratio + (1 - settings.final_ratio) * shape
