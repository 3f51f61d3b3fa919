"""What is found to be wrong with an export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with an export.

    Attributes:
        what: What is wrong.
        cause: The likeliest cause, or what comes of it.
    """

    what: str
    cause: str
