"""Streaming reader of a JSON array: the file may be larger than memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from specforge.data.text.records import RawRecord
from specforge.errors import UsageError

_BLOCK = 1 << 20
_BLANKS = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 16  # an error this close to the end of a block may be a word that continues in the next block


def read_array(file: IO[bytes], shown: str) -> Iterator[RawRecord]:
    """Yield the elements of a file that holds one array.

    Args:
        file: The file, at its start.
        shown: Name of the file in locations and errors.

    Raises:
        UsageError: The file is not one array of JSON values; the message names file and line.
    """
    text = _JsonText(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    number = 0
    try:
        text.take("[")
        while text.peek() != "]":
            if number:
                text.take(",")
            yield RawRecord(text.value(), f"{shown} row {number}")
            number += 1
        text.take("]")
        text.take("")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown}: not UTF-8 text: {error.reason} at row {number}") from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UsageError(f"{shown}:{text.line}: invalid JSON at row {number}: {reason}") from error


class _JsonText:
    """A JSON text file, held in memory one block at a time."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._lines = 0  # lines before the block
        self._block = ""
        self._at = 0

    @property
    def line(self) -> int:
        """Line number of the next character, from 1."""
        return self._lines + self._block.count("\n", 0, self._at) + 1

    def peek(self) -> str:
        """Return the next non-blank character; an empty string at the end."""
        while True:
            self._at = _BLANKS.match(self._block, self._at).end()  # type: ignore[union-attr]  # always matches, possibly nothing
            if self._at < len(self._block) or not self._read_more(_BLOCK):
                return self._block[self._at : self._at + 1]

    def take(self, expected: str) -> None:
        """Consume the next non-blank character; an empty string means the end.

        Raises:
            ValueError: The next character is another one.
        """
        found = self.peek()
        if found != expected:
            raise ValueError(f"expected {expected or 'the end'!r}, found {found or 'the end'!r}")
        self._at += len(found)

    def value(self) -> Any:
        """Consume and return the next value.

        Raises:
            ValueError: No valid value follows.
        """
        self.peek()
        size = _BLOCK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._block, self._at)
                may_continue = end == len(self._block)  # a number may
            except json.JSONDecodeError as error:
                may_continue = error.msg.startswith("Unterminated") or error.pos + _LONGEST_WORD > len(self._block)
                if not (may_continue and self._read_more(size)):
                    self._at = min(error.pos, len(self._block))
                    raise
            else:
                if not (may_continue and self._read_more(size)):
                    self._at = end
                    return value
            size *= 2  # a value of n blocks is parsed O(log n) times

    def _read_more(self, size: int) -> bool:
        more = self._file.read(size)
        if more:
            self._lines += self._block.count("\n", 0, self._at)
            self._block, self._at = self._block[self._at :] + more, 0
        return bool(more)
