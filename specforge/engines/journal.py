"""Journal of replies: appended as they arrive, in any order, so that a killed run loses only those in flight.

A line holds the conversations that were finished together: one through an engine, a batch in process. An incomplete
last line is removed when the journal is opened again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from specforge.engines.generation import Prompt, Reply, rows_of


@dataclass
class ReplyTally:
    """Counts of the written replies.

    Attributes:
        conversations: Finished conversations.
        rows: Rows of these conversations.
        replies: Replies in these conversations.
        tokens: Tokens that the verifier generated.
        finishes: Number of replies by finish reason.
        with_tokens: Conversations with token ids.
    """

    conversations: int = 0
    rows: int = 0
    replies: int = 0
    tokens: int = 0
    finishes: Counter[str] = field(default_factory=Counter)
    with_tokens: int = 0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read a tally back."""
        return cls(**{**values, "finishes": Counter(values["finishes"])})

    def to_json(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return {**asdict(self), "finishes": dict(self.finishes)}


class Journal:
    """The finished conversations of a run and its earlier attempts; a context manager that closes the file.

    Args:
        path: The file; existing entries are kept.

    Raises:
        OSError: The file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.tally = ReplyTally()
        self.finished: set[int] = set()
        self._lines: list[tuple[int, int]] = []  # lowest index in each line, and the line's offset
        # Unbuffered: whatever is reported as kept survives the end of the process.
        self._file = path.open("a+b", buffering=0)
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, answered: Sequence[tuple[Prompt, list[Reply]]]) -> None:
        """Append finished conversations.

        Raises:
            OSError: They cannot be written, and none of them is kept.
        """
        entries = [
            {
                "index": prompt.index,
                "rows": rows_of(prompt.conversation, replies),
                "replies": [{"finish": reply.finish, "tokens": reply.tokens} for reply in replies],
            }
            for prompt, replies in answered
        ]
        begin = self._file.seek(0, 2)
        left = memoryview(json.dumps(entries, ensure_ascii=False).encode() + b"\n")
        try:
            while left:  # a nearly full disk accepts part of the data before it refuses
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(begin)
            raise
        self._record(entries, begin)

    def rows(self) -> Iterable[dict[str, Any]]:
        """Yield all rows in the order of the prompts.

        A line holds consecutive conversations or a single one, so lines are ordered by their first conversation.
        """
        for _, begin in sorted(self._lines):
            self._file.seek(begin)
            for entry in json.loads(self._file.readline()):
                yield from entry["rows"]

    def _read(self) -> None:
        begin = 0
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            for line in lines:
                entries = _parse(line)
                if entries is None:
                    break
                self._record(entries, begin)
                begin += len(line)
        self._file.truncate(begin)

    def _record(self, entries: list[dict[str, Any]], begin: int) -> None:
        self._lines.append((min(entry["index"] for entry in entries), begin))
        for entry in entries:
            replies = entry["replies"]
            self.finished.add(entry["index"])
            self.tally.conversations += 1
            self.tally.rows += len(entry["rows"])
            self.tally.replies += len(replies)
            self.tally.tokens += sum(reply["tokens"] for reply in replies)
            self.tally.finishes.update(reply["finish"] for reply in replies)
            self.tally.with_tokens += "input_ids" in entry["rows"][0]


def _parse(line: bytes) -> list[dict[str, Any]] | None:
    """Return the entries of a line; None if it is incomplete or damaged."""
    try:
        return list(json.loads(line)) if line.endswith(b"\n") else None
    except ValueError:
        return None
