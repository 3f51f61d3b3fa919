"""Numbers within bounds, which jsonargparse checks while it parses the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse.typing import restricted_number_type

# Not beside their use: jsonargparse reads the TYPE_CHECKING blocks of the module whose hints it resolves.
if TYPE_CHECKING:
    RowLength = int
    Share = float
    Decay = float
else:
    RowLength = restricted_number_type("RowLength", int, (">=", 2), docstring="int of at least 2")
    Share = restricted_number_type("Share", float, [(">=", 0), ("<", 1)], docstring="float from 0 to below 1")
    Decay = restricted_number_type("Decay", float, [(">", 0), ("<=", 1)], docstring="float above 0, at most 1")
