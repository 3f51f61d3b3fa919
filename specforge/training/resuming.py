"""What a run that goes on needs beyond what Lightning restores."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class RandomState(Callback):
    """Keeps the state of torch's random numbers, of each process and its device, with the checkpoints.

    Data, noise and text that the core and its plugins draw follow from seeds and positions alone; this is for layers
    that draw by themselves, such as dropout.
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
        """Find this process's; one more than there were goes on from the run's seed."""
        states = checkpoint["random_states"]
        self._resumed = states[trainer.global_rank] if trainer.global_rank < len(states) else {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore it, after everything that was built at random."""
        if "cpu" in self._resumed:
            torch.set_rng_state(self._resumed["cpu"])
        if "cuda" in self._resumed and trainer.strategy.root_device.type == "cuda":
            torch.cuda.set_rng_state(self._resumed["cuda"], trainer.strategy.root_device)
        self._resumed = {}


class BatchNumbers(Callback):
    """Counts on in other batches where a run goes on with another number of processes, or another batch size."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewrite how many batches have been trained on, before Lightning reads it.

        Raises:
            UsageError: The checkpoint stands where no batch begins.
        """
        loops = checkpoint["loops"]["fit_loop"]
        loader = trainer.datamodule.train_dataloader()
        for state in filter(None, loops["state_dict"]["combined_loader"]):
            progress = loops["epoch_loop.batch_progress"]
            current, total = progress["current"], progress["total"]
            if loader.stride != state["stride"]:
                _shift(total, round(total["ready"] * state["stride"] / loader.stride) - total["ready"])
                _shift(current, loader.batches_before(state) - current["ready"])


def _shift(progress: dict[str, int], by: int) -> None:
    # Lightning tells from the differences between these counts where in a step it was.
    for name in progress:
        progress[name] += by
