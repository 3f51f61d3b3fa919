"""How a draft's steps are run in training, for memory or time; what they compute stays the same."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from specforge.models.speculator import SpeculatorModel


def prepare_steps(draft: SpeculatorModel, activation_checkpointing: bool, compiled: bool) -> None:
    """Change how a draft runs ``advance``, of which each step of a chain is one call.

    Args:
        draft: The draft, which is changed.
        activation_checkpointing: Keep only what a step reads and returns, and run it again in the backward pass, with
            the same random numbers.
        compiled: Let torch.compile fuse what lies around the attention.
    """
    if not (activation_checkpointing or compiled):
        return
    advance = draft.advance
    if compiled:
        advance = torch.compile(advance)
    if activation_checkpointing:
        advance = partial(checkpoint, advance, use_reentrant=False)
    setattr(draft, "advance", advance)  # noqa: B010  (a method of this one draft)
