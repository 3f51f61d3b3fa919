"""Counts what a training step makes the host wait for, on the simulated device: by kind, and where it is called."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pretended
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pretended import DEVICE, There
from torch import Tensor

ROOT = Path(__file__).parents[2]
CALLERS = (f"{ROOT}/specforge", f"{ROOT}/plugins", "/lightning/pytorch/", "/torch/optim/", "/torch/nn/utils/")
INDEXING, VALUES, VALUE, TO_HOST, TO_DEVICE = (
    *("boolean indexing", ".tolist()", ".item()", "copy to the host", "copy to the device that is waited for"),
)
# How many there are depends on values, so torch looks at them.
COUNTING = {
    *("nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount", "equal"),
    *("repeat_interleave", "is_nonzero"),
}

found: Counter[tuple[str, str]] = Counter()
"""Times that the host waits in the counted step, by kind and call."""


class CountedStep(Callback):
    """Counts in one training step, from the end of the step before it to its own: with its batch and its logging.

    Args:
        step: Number of the step, counted from 1.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin or end."""
        if trainer.global_step == self.step - 1:
            found.clear()
            pretended.LISTENERS.append(_listen)
        elif trainer.global_step == self.step:
            pretended.LISTENERS.remove(_listen)


def by_kind() -> dict[str, int]:
    """Return how often the host waits, by kind."""
    kinds: Counter[str] = Counter()
    for (kind, _), times in found.items():
        kinds[kind] += times
    return dict(kinds)


def calls() -> str:
    """Return every call and how often it is made, a line each."""
    return "\n".join(f"{times:4} {kind}: {call}" for (kind, call), times in sorted(found.items()))


def _listen(function: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if (kind := _kind(function, args, kwargs)) is not None:
        found[kind, _caller()] += 1


def _kind(function: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Return why the host waits for an operation; None if it does not."""
    name = "tolist" if function is There.tolist else function._schema.name.partition("::")[2]
    first, is_there = args[0] if args else None, bool(args) and isinstance(args[0], There)
    asked = kwargs.get("device")
    goes_there = asked is not None and torch.device(asked).type == DEVICE.type
    if name == "_to_copy" and is_there != goes_there and asked is not None:
        return _kind_of_copy(goes_there, kwargs.get("non_blocking", False))
    if name == "copy_" and isinstance(args[1], There) != is_there and isinstance(first, Tensor) and args[1].ndim:
        return _kind_of_copy(is_there, (args[2:] or [kwargs.get("non_blocking", False)])[0])
    if not is_there:
        return None
    if name == "tolist":
        return VALUES
    if name == "_local_scalar_dense":
        return VALUE
    if name in COUNTING:
        return name
    if function in pretended.INDEXING and any(isinstance(arg, Tensor) and arg.dtype == torch.bool for arg in args[1]):
        return INDEXING
    return None


def _kind_of_copy(goes_there: bool, non_blocking: bool) -> str | None:
    if not goes_there:
        return TO_HOST
    return None if non_blocking else TO_DEVICE


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in CALLERS)]
    # Gradients are computed in a thread of torch's own.
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "the backward pass"
