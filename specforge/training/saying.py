"""Messages of a run to its user."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(text: str) -> None:
    """Print a line for the user, only in the first process."""
    print(text, flush=True)
