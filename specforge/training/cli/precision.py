"""The precisions of Lightning that can train a draft, and why the others cannot."""

from __future__ import annotations

from typing import Any

from specforge.errors import UsageError

# Weights, gradients and optimizer states have at least float32 in all of them.
PRECISIONS = ("32-true", "bf16-mixed", "64-true")
# Other spellings that Lightning reads.
SPELLINGS = {"None": "32-true", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed"}
REASONS = {
    "bf16-true": "weights in bfloat16 lose every update below 1/256 of their size",
    "16-true": "gradients of single tokens are below the smallest number of float16, and weights in float16 lose "
    "updates",
    "16-mixed": "gradients are computed for single tokens, and those are below the smallest number of float16",
}


def check_precision(given: Any) -> None:
    """Refuse a precision in which a draft would train incorrectly.

    Args:
        given: Value of ``trainer.precision``, or the precision set by a plugin of the trainer.

    Raises:
        UsageError: Names the reason and the precision to use instead.
    """
    name = SPELLINGS.get(str(given), str(given))
    if name in PRECISIONS:
        return
    reason = REASONS.get(name, "drafts are neither trained nor tested in it")
    raise UsageError(
        f"trainer.precision: {given} cannot train drafts: {reason}. Set bf16-mixed, which computes in bfloat16 and "
        f"keeps weights in float32, or 32-true if the device has no bfloat16; allowed: {', '.join(PRECISIONS)}"
    )
