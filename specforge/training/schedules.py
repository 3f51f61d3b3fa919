"""Learning-rate schedules: a linear warmup, then cosine, linear, constant or warmup-stable-decay."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from specforge.bounds import Amount, Portion


class ScheduleSettings(BaseModel):
    """How the learning rate moves over the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="What follows the warmup; wsd stays at the peak and decays linearly at the end."
    )
    warmup: Amount = Field(
        default=0.015, description="Length of the linear warmup: below 1 a share of all steps, otherwise steps."
    )
    final_ratio: Portion = Field(default=0.0, description="Learning rate at the end, as a share of the peak.")
    decay_share: Portion = Field(default=0.2, gt=0, description="Share of all steps in which wsd decays.")


def build_schedule(optimizer: Optimizer, settings: ScheduleSettings, total_steps: int) -> LambdaLR:
    """Create the schedule of a run.

    Args:
        optimizer: Its learning rates are the peaks.
        settings: The shape.
        total_steps: Number of optimizer steps in the whole run.
    """
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
        # At least one step decays, so that a short run ends at the final ratio, too.
        begin = max(warmup, min(total_steps * (1 - settings.decay_share), total_steps - 1))
    progress = min(1.0, max(0.0, (step - begin) / max(1.0, total_steps - begin)))
    shape = (1 + math.cos(math.pi * progress)) / 2 if settings.name == "cosine" else 1 - progress
    return settings.final_ratio + (1 - settings.final_ratio) * shape
