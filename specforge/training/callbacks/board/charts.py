"""The charts that TensorBoard shows under Custom Scalars."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from specforge.training.callbacks.board.writers import writers
from specforge.training.module import DraftModule

# Where the charts are, without smoothing.
ADDRESS = "http://localhost:6006/#custom_scalars&_smoothingWeight=0"
# Title, and patterns of the tags that are drawn in one chart.
Charts = dict[str, list[str]]


class ScalarCharts(Callback):
    """Writes the layout of the Custom Scalars tab when a run starts."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout; its patterns also match tags that appear later."""
        groups = chart_groups(cast(DraftModule, pl_module).term_weights)
        for writer in writers(trainer):
            writer.add_custom_scalars(
                {
                    group: {title: ["Multiline", tags] for title, tags in charts.items()}
                    for group, charts in groups.items()
                }
            )


def chart_groups(losses: Iterable[str]) -> dict[str, Charts]:
    """Return the charts of each group.

    Args:
        losses: Names of the terms of the loss.
    """
    return {
        "Acceptance length": {
            "Tokens per verifier forward pass": [r"val/acceptance_length(_sampled)?(_proxy)?$"],
            "With shorter chains of K tokens": [r"val/acceptance_length_at_\d+(_sampled)?(_proxy)?$"],
        },
        "Acceptance by position": {
            "Rounds that accept at least k tokens": [r"val/accept_rate_pos_\d+"],
            "Of the rounds that accept k - 1, those that accept k": [r"val/accept_rate_cond_\d+"],
            "Acceptance at each draft step, training": [r"train/acceptance/step_\d+$"],
            "Acceptance at each draft step, validation": [r"val/acceptance/step_\d+$"],
        },
        "Losses": {
            "The training objective": [r"(train|val)/loss$"],
            **{
                f"{loss} at each draft step, {stage}": [rf"{tag}/{re.escape(loss)}/step_\d+$"]
                for loss in losses
                for tag, stage in (("train", "training"), ("val", "validation"))
            },
        },
        "Speed and memory": {
            "Tokens per second": [r"train/tokens_per_second$"],
            "Share of the time that training waits for data": [r"train/idle_share$"],
            "Peak memory so far, GB": [r"train/peak_memory_gb$"],
        },
        "Learning rate": {"Of the first parameter group": [r"train/learning_rate$"]},
    }
