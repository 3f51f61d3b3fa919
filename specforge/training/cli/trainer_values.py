"""Bounds of the trainer's keys: values that Lightning accepts, but fails on later or interprets differently."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Any

from jsonargparse import Namespace

from specforge.bounds import LARGEST
from specforge.errors import UsageError, nearest_name

# Other strategies shard by hooks that a draft's steps do not call, or leave parts of checkpoints in each process.
STRATEGIES = ("auto", "ddp", "fsdp2")
LOWEST = {
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "fast_dev_run": 0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 0,
    "accumulate_grad_batches": 1,
    "reload_dataloaders_every_n_epochs": 0,
}
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
MOST_PROCESSES = 2**20
# Each with the values that barebones does not override.
EXCLUDED_BY_BAREBONES: dict[str, tuple[Any, ...]] = {
    "enable_checkpointing": (None, False),
    "logger": (None, False),
    "enable_progress_bar": (None, False),
    "log_every_n_steps": (None, 0),
    "enable_model_summary": (None, False),
    "num_sanity_val_steps": (None, 0),
    "fast_dev_run": (None, False, 0),
    "detect_anomaly": (None, False),
    "profiler": (None,),
}


def check_trainer(trainer: Namespace) -> None:
    """Refuse values of the trainer's keys that are out of bounds or conflict.

    Args:
        trainer: The parsed settings.

    Raises:
        UsageError: Names the key, the value and the allowed values.
    """
    strategy = trainer.strategy
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise UsageError(
            f"trainer.strategy: {strategy!r} cannot train drafts; allowed: {', '.join(STRATEGIES)}."
            f"{nearest_name(strategy, STRATEGIES)}"
        )
    for key, lowest in LOWEST.items():
        if _is_integer(trainer[key]) and not lowest <= trainer[key] <= LARGEST:
            _refuse(key, trainer[key], f"an integer of at least {lowest}")
    for key in LIMITS:
        _check_limit(key, trainer[key])
    if not 1 <= trainer.num_nodes <= MOST_PROCESSES:
        _refuse("num_nodes", trainer.num_nodes, "an integer of at least 1")
    devices = str(trainer.devices)  # of a flag, a number is a text
    if re.fullmatch(r"-?\d+", devices) and devices != "-1" and not 1 <= int(devices) <= MOST_PROCESSES:
        _refuse("devices", devices, "an integer of at least 1, -1 for all, a list of device numbers, or auto")
    clip = trainer.gradient_clip_val
    if clip is not None and not (clip >= 0 and math.isfinite(clip)):
        _refuse("gradient_clip_val", clip, "a finite number of at least 0, or null")
    _check_interval(trainer.val_check_interval, trainer.check_val_every_n_epoch)
    if trainer.max_time is not None and not _is_duration(trainer.max_time):
        _refuse("max_time", trainer.max_time, "days:hours:minutes:seconds such as 00:12:00:00, or {hours: 12}")
    _check_what_is_stored(trainer)


def explain_trainer(error: Exception) -> str:
    """Return a readable reason why the trainer cannot be created.

    Args:
        error: What Lightning, or the class of a logger or callback, raised.
    """
    reason = " ".join(str(error).split())
    if "SLURM" in reason:
        return (
            "the variables of SLURM do not match this run. Start one task per device with "
            "#SBATCH --ntasks-per-node=N, srun specforge fit ... --trainer.devices N --trainer.num_nodes NODES; "
            f"or, without srun and on this node only, set SLURM_JOB_NAME=bash. Lightning says: {reason}"
        )
    if chosen := re.search(r"(gpu) backend|`(CUDA)Accelerator` can not run", reason):
        import torch

        build = f"torch {torch.__version__}"
        why = f"no GPU is visible to {build}" if torch.backends.cuda.is_built() else f"{build} is built without GPUs"
        name = (chosen[1] or chosen[2]).lower()
        return f"accelerator: {name} is not available: {why}. Set auto, which uses what there is; see: specforge doctor"
    return reason or type(error).__name__


def _check_limit(key: str, value: Any) -> None:
    is_share = isinstance(value, float) and 0 <= value <= 1
    if value is not None and not is_share and not (_is_integer(value) and 0 <= value <= LARGEST):
        _refuse(key, value, "a share from 0.0 to 1.0, or a number of batches as an integer of at least 0")


def _check_interval(interval: Any, every_n_epoch: int | None) -> None:
    allowed = "batches as an integer of at least 1, a share of an epoch above 0.0 up to 1.0, or a time DD:HH:MM:SS"
    is_number = isinstance(interval, int | float)
    in_bounds = 1 <= interval <= LARGEST if _is_integer(interval) else is_number and 0 < interval <= 1
    if interval is not None and not in_bounds and (is_number or not _is_duration(interval)):
        _refuse("val_check_interval", interval, allowed)
    if every_n_epoch is None and isinstance(interval, float):
        raise UsageError(
            f"trainer.val_check_interval: {interval} is a share of an epoch, but trainer.check_val_every_n_epoch: null "
            "counts batches across epochs; give a number of batches"
        )


def _check_what_is_stored(trainer: Namespace) -> None:
    if trainer.barebones:
        for key, left in EXCLUDED_BY_BAREBONES.items():
            if trainer[key] not in left:
                raise UsageError(
                    f"trainer.barebones: a bare run is timed without {key}; omit trainer.{key} or barebones"
                )
    elif trainer.enable_checkpointing is False and not trainer.fast_dev_run:
        raise UsageError(
            "trainer.enable_checkpointing: false is not allowed: the best draft is written from a checkpoint, and a "
            "run that is stopped resumes from one. To try a run without storing anything, set trainer.fast_dev_run: "
            "true or trainer.barebones: true"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_duration(value: Any) -> bool:
    if isinstance(value, timedelta):
        return value.total_seconds() > 0
    if isinstance(value, str):
        return re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value.strip()) is not None
    try:
        return timedelta(**value).total_seconds() > 0
    except (TypeError, ValueError, OverflowError):
        return False


def _refuse(key: str, value: Any, allowed: str) -> None:
    raise UsageError(f"trainer.{key}: expected {allowed}, got {value}")
