"""The table of runs under HParams: the settings and results of each run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from specforge.config import flatten
from specforge.private.torch import add_summary
from specforge.training.callbacks.board.writers import writers
from specforge.training.callbacks.configuration import settings_of_run
from specforge.training.module import DraftModule

# The trainer's settings that change a run's result or cost.
TRAINER = (
    "accumulate_grad_batches",
    "devices",
    "gradient_clip_val",
    "max_epochs",
    "max_steps",
    "num_nodes",
    "precision",
    "strategy",
)
# Settings that are locations.
LOCATIONS = ("output_dir", "run_name", "ckpt_path", "save_every_n_steps", "data.cache_dir")
# A dictionary, whose keys would be a column each.
OBJECTIVE = "model.objective"
# Settings of display and storage, which do not change the result.
SHOWING = "callbacks"


class Hyperparameters(Callback):
    """Writes a run's settings for its loggers, and at its end the results to compare runs by.

    TensorBoard builds a table of all runs in a folder, with settings that differ first. It takes every scalar's last
    value as a result and shows the first five by name: ``best/...``, ``epoch`` and ``final/...``.
    """

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings."""
        settings = compared_settings(settings_of_run(trainer, pl_module))
        # The first summary would fix the columns of the table to those of this run.
        _, start, self._end = hparams(settings, {})
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):  # it would add a result that was not measured
                logger.log_hyperparams(settings)
        for writer in writers(trainer):
            add_summary(writer, start)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last results and the end of the run."""
        log_results("final", trainer, pl_module)
        for writer in writers(trainer):
            add_summary(writer, self._end)

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the last results of a run that was stopped."""
        log_results("final", trainer, pl_module)


def log_results(group: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Log acceptance length and loss of the last validation, if there was one, again under another name.

    Args:
        group: The part of the name before the slash.
        trainer: The trainer, which holds the metrics.
        pl_module: The module that logged them.
    """
    found = trainer.callback_metrics
    if "val/loss" not in found:
        return
    results = {
        name.replace("val/", f"{group}/"): float(found[name])
        for name in (cast(DraftModule, pl_module).monitor, "val/loss")
    }
    for logger in trainer.loggers:
        logger.log_metrics(results, trainer.global_step)


def compared_settings(config: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Return the settings that runs are compared by, by the path of their keys.

    Numbers and strings stay as they are, the objective becomes one text, and other values become JSON.

    Args:
        config: The resolved configuration.
    """
    settings: dict[str, str | int | float] = {}
    for key, value in flatten(config):
        group, _, name = key.partition(".")
        if name in TRAINER if group == "trainer" else group != SHOWING and key not in LOCATIONS:
            is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
            settings[key] = value if is_plain else json.dumps(value)
    terms = {key: settings.pop(key) for key in list(settings) if key.startswith(f"{OBJECTIVE}.")}
    if terms:
        settings[OBJECTIVE] = ", ".join(f"{key.rpartition('.')[2]} {weight:g}" for key, weight in terms.items())
    return settings
