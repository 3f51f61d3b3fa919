"""What a run tells the person who started it."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(text: str) -> None:
    """Print a line for a person, once in a run of many processes."""
    print(text, flush=True)
