"""State of a resumed run that Lightning does not restore."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from specforge.config import flatten
from specforge.data.module import data_of
from specforge.training.callbacks.configuration import settings_of_run
from specforge.training.saying import say

_NOT_COMPARED = ("output_dir", "run_name", "ckpt_path", "callbacks.")  # locations and display


class RandomState(Callback):
    """Stores the states of torch's random number generators, of each process and its device, in checkpoints.

    Random data, noise and text of the core and its plugins depend only on seeds and positions; this is for layers with
    their own random numbers, such as dropout.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Tensor] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the states of all processes."""
        device = trainer.strategy.root_device
        own = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(device)
        states = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, own)
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read this process's state; an additional process starts from the run's seed."""
        states = checkpoint["random_states"]
        self._resumed = states[trainer.global_rank] if trainer.global_rank < len(states) else {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state, after everything that is initialised at random."""
        if "cpu" in self._resumed:
            torch.set_rng_state(self._resumed["cpu"])
        if "cuda" in self._resumed and trainer.strategy.root_device.type == "cuda":
            torch.cuda.set_rng_state(self._resumed["cuda"], trainer.strategy.root_device)
        self._resumed = {}


class BatchNumbers(Callback):
    """Recounts batches if a run is resumed with another number of processes or another batch size."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewrite the number of trained batches before Lightning reads it.

        Raises:
            UsageError: The checkpoint's position is inside a batch.
        """
        loops = checkpoint["loops"]["fit_loop"]
        loader = data_of(trainer).train_dataloader()
        for state in filter(None, loops["state_dict"]["combined_loader"]):
            progress = loops["epoch_loop.batch_progress"]
            current, total = progress["current"], progress["total"]
            if loader.stride != state["stride"]:
                _shift(total, round(total["ready"] * state["stride"] / loader.stride) - total["ready"])
                _shift(current, loader.batches_before(state) - current["ready"])


class ResumedSettings(Callback):
    """Stores the run's settings in its checkpoints; a resumed run prints which it changes, and applies them.

    Lightning restores the hyperparameters of optimizer and schedule with their states, so a changed learning rate would
    have no effect.
    """

    def __init__(self) -> None:
        self._settings: dict[str, Any] = {}
        self._is_resumed = False
        self._stored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the settings."""
        checkpoint["settings"] = self._settings

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the settings so far; an earlier version, or a run without this callback, stored none."""
        self._is_resumed = True
        self._stored = checkpoint.get("settings")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the differences, and apply the current settings to optimizer and schedule."""
        self._settings = dict(flatten(settings_of_run(trainer, pl_module)))
        self._settings["tokenizer"] = data_of(trainer).tokenizer_digest  # and chat template
        if not self._is_resumed:
            return
        self._is_resumed = False
        if changed := self._changed():
            say(f"resumed with other settings: {', '.join(changed)}")
        before = trainer.optimizers[0].param_groups[0]["lr"]
        _follow_settings(trainer, pl_module)
        now = trainer.optimizers[0].param_groups[0]["lr"]
        if not math.isclose(before, now, rel_tol=1e-6):
            say(
                f"the learning rate continues at {now:.3g} instead of {before:.3g}, following the current schedule "
                f"at step {trainer.global_step:,}; to keep a rate, set it as model.optimizer.lr, with "
                "model.schedule.name constant"
            )

    def _changed(self) -> list[str]:
        before, now = self._stored or self._settings, self._settings
        return [
            f"{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted(now.keys() | before.keys())
            if not name.startswith(_NOT_COMPARED) and before.get(name) != now.get(name)
        ]


def _follow_settings(trainer: Trainer, module: LightningModule) -> None:
    """Give optimizer and schedule the settings of a new run; their states are unchanged."""
    fresh = cast(dict[str, Any], module.configure_optimizers())
    groups, schedule = trainer.optimizers[0].param_groups, trainer.lr_scheduler_configs[0].scheduler
    for group, own in zip(groups, fresh["optimizer"].param_groups, strict=True):
        rate = group["lr"]
        group.update({name: value for name, value in own.items() if name != "params"}, lr=rate)
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = fresh["lr_scheduler"]["scheduler"].base_lrs
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)


def _shift(progress: dict[str, int], by: int) -> None:
    # Lightning infers its position inside a step from the differences between these counts.
    for name in progress:
        progress[name] += by
