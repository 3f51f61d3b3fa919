"""The error of one row that cannot be trained on."""

from __future__ import annotations

from specforge.errors import UsageError


class BadRow(UsageError):
    """One row of a source is malformed; the rows around it may be good.

    Attributes:
        location: File and line of the row, such as ``train.jsonl:12``.
        reason: A few words that are the same for all rows with this fault, to count by, such as ``no messages``.
    """

    def __init__(self, location: str, reason: str, explanation: str) -> None:
        # All three are arguments of the exception, so that it survives the way from a worker process.
        super().__init__(location, reason, explanation)
        self.location = location
        self.reason = reason
        self.explanation = explanation

    def __str__(self) -> str:
        return f"{self.location}: {self.explanation}"
