"""The error of one row that cannot be trained on."""

from __future__ import annotations

from specforge.errors import UsageError


class BadRow(UsageError):
    """One row of a source is malformed; other rows may be good.

    Attributes:
        location: File and line of the row, such as ``train.jsonl:12``.
        reason: A short label shared by all rows with this error, for counting, such as ``no messages``.
    """

    def __init__(self, location: str, reason: str, explanation: str) -> None:
        # All three are exception arguments, so that the error can be pickled in a worker process.
        super().__init__(location, reason, explanation)
        self.location = location
        self.reason = reason
        self.explanation = explanation

    def __str__(self) -> str:
        return f"{self.location}: {self.explanation}"
