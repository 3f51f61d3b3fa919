"""Private names of Lightning."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.plugins.environments import ClusterEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

# As Lightning's command line notes it: from plain values, jsonargparse makes what the constructor is typed to take.
_INSTANTIATOR = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}


def make_loadable(hparams: MutableMapping[str, Any]) -> None:
    """Make hyperparameters plain values, which checkpoints can store and ``load_from_checkpoint`` turns back.

    What has no plain form is left out, and has to be given to ``load_from_checkpoint``.

    Args:
        hparams: What ``save_hyperparameters`` has kept; is changed.
    """
    for name, value in list(hparams.items()):
        try:
            hparams[name] = to_jsonable_python(value)
        except PydanticSerializationError:
            del hparams[name]
    hparams.update(_INSTANTIATOR)


def has_trainer(module: LightningModule) -> bool:
    """Return whether a module is attached to a trainer; asking for it raises an error if not."""
    return module._trainer is not None


def validation_follows(trainer: Trainer) -> bool:
    """Return whether the training batch that has just ended is followed by a validation."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether further batches belong to the optimizer step under way."""
    return bool(trainer.fit_loop._should_accumulate())


def may_stop_early(trainer: Trainer) -> bool:
    """Return whether ``min_steps`` and ``min_epochs``, if they are set, have been reached."""
    return bool(trainer.fit_loop._can_stop_early)


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """Return what launched the processes; a strategy of one process does not tell."""
    return trainer._accelerator_connector.cluster_environment


def shard_over(strategy: ModelParallelStrategy, processes: int) -> None:
    """Have a strategy split each tensor's data over so many processes, and no tensor's computation.

    Its own constructor takes numbers, but is called before those of nodes and devices are known.
    """
    strategy._data_parallel_size, strategy._tensor_parallel_size = processes, 1
