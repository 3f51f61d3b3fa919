"""Rows with their location in the source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from specforge.data.text.bad_rows import BadRow

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """A row and its location for errors, such as ``train.jsonl:12``."""

    value: dict[str, Any]
    location: str


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A row as its source holds it: an unparsed line of JSON, or values."""

    content: bytes | Any
    location: str

    def parse(self) -> Record:
        """Return the row.

        Raises:
            BadRow: The row is not a JSON object; the message names file and line.
        """
        content = self.content
        value = _parse_line(content, self.location) if isinstance(content, bytes) else content
        if not isinstance(value, dict):
            found = "null" if value is None else type(value).__name__
            raise BadRow(self.location, "not a JSON object", f"a row must be a JSON object, found {found}")
        return Record(value, self.location)


def _parse_line(line: bytes, location: str) -> Any:
    try:
        # Without the end of the line, after which columns would be counted from 1 again.
        return json.loads(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        explanation = f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
        raise BadRow(location, "not UTF-8", explanation) from error
    except json.JSONDecodeError as error:
        explanation = f"invalid JSON: {error.msg} (column {error.colno}); each line must be a complete JSON object"
        raise BadRow(location, "invalid JSON", explanation) from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of brackets
        raise BadRow(location, "invalid JSON", f"invalid JSON: {error}") from error
