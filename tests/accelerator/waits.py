"""Counts how often a training step makes the host wait for the simulated device, by kind and caller."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import simulated_device
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from simulated_device import DEVICE, DeviceTensor, Event
from torch import Tensor

ROOT = Path(__file__).parents[2]
CALLERS = (f"{ROOT}/specforge", f"{ROOT}/plugins", "/lightning/pytorch/", "/torch/optim/", "/torch/nn/utils/")
INDEXING, VALUES, VALUE, TO_HOST, TO_DEVICE, EVENT = (
    *("boolean indexing", ".tolist()", ".item()", "copy to the host", "blocking copy to the device", "event"),
)
# The size of their output depends on values, so torch reads them.
COUNTING = {
    *("nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount", "equal"),
    *("repeat_interleave", "is_nonzero"),
}

found: Counter[tuple[str, str]] = Counter()
"""Times that the host waits in the counted step, by kind and call."""


class CountedStep(Callback):
    """Counts in one training step, from the end of the step before it to its own end, including its batch and logging.

    Args:
        step: Number of the step, counted from 1.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start or stop counting."""
        if trainer.global_step == self.step - 1:
            found.clear()
            simulated_device.LISTENERS.append(_listen)
        elif trainer.global_step == self.step:
            simulated_device.LISTENERS.remove(_listen)


def by_kind() -> dict[str, int]:
    """Return how often the host waits, by kind."""
    kinds: Counter[str] = Counter()
    for (kind, _), times in found.items():
        kinds[kind] += times
    return dict(kinds)


def calls() -> str:
    """Return each call with its count, one per line."""
    return "\n".join(f"{times:4} {kind}: {call}" for (kind, call), times in sorted(found.items()))


def _listen(function: Any, args: Any, kwargs: dict[str, Any], _: Any) -> None:
    if (kind := kind_of(function, args, kwargs)) is not None:
        found[kind, caller()] += 1


def kind_of(function: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Return why the host waits for an operation; None if it does not."""
    if function in (Event.record, Event.synchronize):
        return EVENT if function is Event.synchronize else None
    name = "tolist" if function is DeviceTensor.tolist else function._schema.name.partition("::")[2]
    first, on_device = args[0] if args else None, bool(args) and isinstance(args[0], DeviceTensor)
    requested = kwargs.get("device")
    to_device = requested is not None and torch.device(requested).type == DEVICE.type
    if name == "_to_copy" and on_device != to_device and requested is not None:
        return _kind_of_copy(to_device, kwargs.get("non_blocking", False))
    copies = name == "copy_" and isinstance(first, Tensor) and args[1].ndim
    if copies and isinstance(args[1], DeviceTensor) != on_device:
        return _kind_of_copy(on_device, (args[2:] or [kwargs.get("non_blocking", False)])[0])
    if not on_device:
        return None
    if name == "tolist":
        return VALUES
    if name == "_local_scalar_dense":
        return VALUE
    if name in COUNTING:
        return name
    if function in simulated_device.INDEXING and any(
        isinstance(arg, Tensor) and arg.dtype == torch.bool for arg in args[1]
    ):
        return INDEXING
    return None


def _kind_of_copy(to_device: bool, non_blocking: bool) -> str | None:
    if non_blocking:
        return None
    return TO_DEVICE if to_device else TO_HOST


def caller() -> str:
    """Return the innermost line of the project, Lightning or an optimizer that is running."""
    frames = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in CALLERS)]
    # Gradients are computed in a thread of torch.
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "the backward pass"
