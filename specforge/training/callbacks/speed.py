"""A run's speed, its time spent waiting for data, and its memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from specforge.data.loader import ResumableLoader
from specforge.training.attached import is_fitting
from specforge.training.totals import total


class Throughput(Callback):
    """Logs speed and memory of training, excluding validation, at the trainer's interval.

    ``tokens_per_second`` counts tokens of documents in all processes, without padding. ``idle_share`` is the share of
    the time in which a process waits for the next batch, ``peak_memory_gb`` the most memory since the start (see
    ``peak_memory``); of several processes, both are those of the one with most.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._since = 0.0
        self._waited_before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._restart(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude the time of validation."""
        if is_fitting(trainer):
            self._restart(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Count the batch, and log at the trainer's interval."""
        self._tokens = self._tokens + (batch["document_ids"] >= 0).sum()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            tokens = float(total(torch.as_tensor(self._tokens)))
            seconds = time.perf_counter() - self._since
            device = trainer.strategy.root_device
            waited = _loader(trainer).seconds_waited - self._waited_before
            own = torch.tensor([waited / seconds, peak_memory(device) / 1e9], device=device)
            idle_share, memory = trainer.strategy.reduce(own, reduce_op="max")
            pl_module.log_dict(
                {
                    "train/tokens_per_second": tokens / seconds,
                    "train/idle_share": idle_share,
                    "train/peak_memory_gb": memory,
                }
            )
            self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self._tokens = 0
        self._since = time.perf_counter()
        self._waited_before = _loader(trainer).seconds_waited


def _loader(trainer: Trainer) -> ResumableLoader:
    return cast(ResumableLoader, trainer.train_dataloader)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a CUDA device, otherwise of the process.

    Args:
        device: Device of the run.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # bytes on macOS, kibibytes elsewhere
