"""Replies on their way: appended as they come, in whatever order, so that a run that is killed keeps all but the last.

A line holds the conversations that were finished together, whole or not at all: one through an engine, a batch in
process. A last line that is torn is cut off when the journal is opened again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from specforge.engines.asking import Prompt, Reply, rows_of


@dataclass
class ReplyTally:
    """What was written.

    Attributes:
        conversations: Conversations with all their replies.
        rows: Rows of them.
        replies: Replies in them.
        tokens: Tokens that the verifier produced.
        finishes: How many replies ended why.
        with_tokens: Conversations whose tokens are known.
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
        """Return plain values that JSON can hold."""
        return {**asdict(self), "finishes": dict(self.finishes)}


class Journal:
    """The finished conversations of a run and of those before it; use it as a context, which closes it.

    Args:
        path: The file; what it holds already is kept.

    Raises:
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.tally = ReplyTally()
        self.finished: set[int] = set()
        self._lines: list[tuple[int, int]] = []  # least index of a line, and where it begins
        # Unbuffered: what a run says it has kept is out of its hands, and survives its end.
        self._file = path.open("a+b", buffering=0)
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, answered: Sequence[tuple[Prompt, list[Reply]]]) -> None:
        """Keep conversations that are finished.

        Raises:
            OSError: They cannot be written; then none of them is kept.
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
            while left:  # a disk that is nearly full takes a part, and refuses the next
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(begin)
            raise
        self._note(entries, begin)

    def rows(self) -> Iterable[dict[str, Any]]:
        """Yield all rows in the order of the prompts.

        Lines hold neighbours, or one conversation alone; hence their order is that of their first conversations.
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
                self._note(entries, begin)
                begin += len(line)
        self._file.truncate(begin)

    def _note(self, entries: list[dict[str, Any]], begin: int) -> None:
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
    """Return the entries of a line; None for one that is torn."""
    try:
        return list(json.loads(line)) if line.endswith(b"\n") else None
    except ValueError:
        return None
