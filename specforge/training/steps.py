"""Activation checkpointing and compilation of a draft's steps; their results stay the same."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from specforge.models.speculator import SpeculatorModel


def prepare_steps(draft: SpeculatorModel, activation_checkpointing: bool, compiled: bool) -> None:
    """Change how a draft runs ``advance``, which is called once per step of a chain.

    Args:
        draft: The draft; changed in place.
        activation_checkpointing: Whether to keep only a step's inputs and outputs and recompute the rest in the
            backward pass, with the same random numbers.
        compiled: Whether torch.compile fuses the operations around the attention.
    """
    if not (activation_checkpointing or compiled):
        return
    advance = draft.advance
    if compiled:
        advance = torch.compile(advance)
    if activation_checkpointing:
        advance = partial(checkpoint, advance, use_reentrant=False)
    setattr(draft, "advance", advance)  # noqa: B010  (a method of this draft only)
