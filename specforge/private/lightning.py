"""Private names of Lightning."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from pydantic_core import PydanticSerializationError, to_jsonable_python

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.plugins.environments import ClusterEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

# Marked as by Lightning's command line, so that jsonargparse converts plain values to the constructor's types.
_INSTANTIATOR = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}


def make_loadable(hparams: MutableMapping[str, Any]) -> None:
    """Convert hyperparameters to plain values, which checkpoints store and ``load_from_checkpoint`` converts back.

    Values without a plain form are left out and must be passed to ``load_from_checkpoint``.

    Args:
        hparams: The result of ``save_hyperparameters``; changed in place.
    """
    for name, value in list(hparams.items()):
        try:
            hparams[name] = to_jsonable_python(value)
        except PydanticSerializationError:
            del hparams[name]
    hparams.update(_INSTANTIATOR)


def has_trainer(module: LightningModule) -> bool:
    """Return whether a module is attached to a trainer; its ``trainer`` property raises an error if not."""
    return module._trainer is not None


def validation_follows(trainer: Trainer) -> bool:
    """Return whether a validation follows the training batch that has just ended."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the current optimizer step has further batches."""
    return bool(trainer.fit_loop._should_accumulate())


def logs_now(trainer: Trainer) -> bool:
    """Return whether the current training batch's figures are written, by the trainer's interval or as its last."""
    return bool(trainer._logger_connector.should_update_logs)


def may_stop_early(trainer: Trainer) -> bool:
    """Return whether ``min_steps`` and ``min_epochs``, if set, have been reached."""
    return bool(trainer.fit_loop._can_stop_early)


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """Return the environment that launched the processes; a single-process strategy does not expose it."""
    return trainer._accelerator_connector.cluster_environment


def shard_over(strategy: ModelParallelStrategy, processes: int) -> None:
    """Set a strategy to pure data parallelism over a number of processes.

    Its constructor takes the sizes, but runs before the numbers of nodes and devices are known.
    """
    strategy._data_parallel_size, strategy._tensor_parallel_size = processes, 1


def name_run(logger: Logger, name: str) -> None:
    """Name the run of a logger that was created without a name for it; W&B and MLflow would make one up."""
    if isinstance(logger, MLFlowLogger):
        logger._run_name = logger._run_name or name
    elif isinstance(logger, WandbLogger):
        logger._wandb_init["name"] = logger._wandb_init["name"] or os.environ.get("WANDB_NAME", name)


class EpochBar(RichProgressBar):
    """Lightning's progress bar; if the number of epochs has no limit, it shows ``Epoch 0``, not ``Epoch 0/-2``."""

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description.replace("/-2", "").ljust(len(description))
