"""Verifier states that are not finite: which tensor or dtype is the cause."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specforge.errors import UsageError


def check_finite(states: Tensor, verifier: nn.Module, name: str) -> None:
    """Check that the states or logits of a verifier are finite.

    Args:
        states: States or logits, of any shape.
        verifier: The model that computed them, or its parts.
        name: Its folder or hub id.

    Raises:
        UsageError: They are not; names the damaged tensor or the dtype that overflows.
    """
    if states.isfinite().all():
        return
    damaged = _first_non_finite(verifier)
    dtype = str(next(verifier.parameters()).dtype).removeprefix("torch.")
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(dtype)
    if damaged is None or (dtype == "float16" and not damaged[1].isnan().any()):
        what = "its states are" if damaged is None else f"its tensor {damaged[0]} is"
        advice = f"set verifier_dtype to {wider}" if wider else "it cannot be a verifier"
        raise UsageError(f"verifier {name}: {what} not finite in {dtype}: its range is exceeded; {advice}")
    raise UsageError(
        f"verifier {name}: its tensor {damaged[0]} holds NaN or infinite values, and so do its states; the "
        "checkpoint is damaged, fetch or convert it again"
    )


def _first_non_finite(module: nn.Module) -> tuple[str, Tensor] | None:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return next(((name, one) for name, one in tensors if not torch.isfinite(one).all()), None)
