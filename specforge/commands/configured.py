"""The module and the data of a configuration, for commands that read what a run would, without a trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specforge.data.module import LIVE, DraftDataModule
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.registry import installed
from specforge.training.cli.command_line import TrainingCLI
from specforge.training.cli.config_files import choose_algorithm
from specforge.training.module import DraftModule
from specforge.training.teacher import FrozenVerifier


class _Settings(TrainingCLI):
    """The module and the data of a configuration, without a trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Create none: the trainer does not manage the processes here."""
        return None


def module_and_data(words: Sequence[str], sources: Sequence[str] = ()) -> tuple[DraftModule, DraftDataModule]:
    """Build module and data of a configuration; nothing is loaded yet.

    Args:
        words: Arguments of ``specforge fit``.
        sources: Sources that replace those of the configuration.

    Raises:
        UsageError: The arguments are invalid.
    """
    algorithms = installed().all(Algorithm)
    name = choose_algorithm(list(words))
    if name is None:
        raise UsageError(
            f"no algorithm is chosen; give --config FILE, or --algorithm with one of: {', '.join(algorithms)}"
        )
    # The configuration's own sources need not exist.
    named = ["--data.train", sources[0], "--data.validation", "null", "--data.test", "null"] if sources else []
    # Nothing here is random, and the features named in the configuration do not exist yet.
    words = [*words, *named, "--data.features", LIVE, "--data.record", "null", "--seed_everything", "false"]
    settings = _Settings(installed().find(Algorithm, name), words, "fit")
    return settings.model, settings.datamodule


def verifier_states(teacher: FrozenVerifier, aux_layers: list[int], input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return states [B, T, L, H] of a verifier, which is loaded on first use; the last of the L is its last state.

    Args:
        teacher: The verifier.
        aux_layers: Ids of the other layers, ascending.
        input_ids: Tokens [B, T].
        position_ids: Positions [B, T]; those that restart at 0 begin a document.
    """
    if not teacher.is_held:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        teacher.load(torch.accelerator.current_accelerator(check_available=True))
    device = teacher.model.device
    batch = {"input_ids": input_ids.to(device), "position_ids": position_ids.to(device)}
    features = teacher.states(batch, aux_layers)
    return torch.cat([features.aux, features.last[:, :, None]], dim=2)
