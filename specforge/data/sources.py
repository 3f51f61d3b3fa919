"""Where rows come from: a JSON-lines file, a folder of token rows or of `datasets`, or a data set on the hub."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge.data.bad_rows import BadRow
from specforge.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

ALLOWED_SOURCES = (
    "allowed: a .jsonl or .json file with one JSON object a line, a folder written by specforge prepare rows or by "
    "datasets.save_to_disk, or a hub data set as owner/name or owner/name:split"
)
ROWS_FILE = "rows.arrow"  # in a folder of token rows
_FILE_SUFFIXES = (".jsonl", ".json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w\[\]%:+.-]+)?")


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row and the place to name when it is refused, such as `train.jsonl:12`."""

    value: dict[str, Any]
    location: str


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A row as it lies in its source: a line of JSON that nobody has parsed yet, or the values of a data set."""

    content: bytes | dict[str, Any]
    location: str

    def parse(self) -> Record:
        """Return the row.

        Raises:
            BadRow: the line is no JSON object; the message names file and line.
        """
        content = self.content
        return Record(_parse_line(content, self.location) if isinstance(content, bytes) else content, self.location)


def check_source(source: str, key: str) -> None:
    """Refuse a source that cannot be read, before anything is loaded.

    Args:
        source: path or hub name, as the user wrote it.
        key: configuration key to name in the message, such as `data.train`.

    Raises:
        UsageError: the file is missing or empty, or the folder is no folder of `datasets`.
    """
    path = Path(source)
    if path.is_dir():
        if (path / ROWS_FILE).is_file():
            return
        if splits := sorted(str(file.parent) for file in path.glob(f"*/{ROWS_FILE}")):
            raise UsageError(f"{key}: {source} holds several sets of rows; name one of {splits}")
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            raise UsageError(f"{key}: {source} holds several splits; name one of {[f'{source}/{s}' for s in splits]}")
        if not (path / "state.json").is_file():
            raise UsageError(f"{key}: {source} is a folder without rows; {ALLOWED_SOURCES}")
    elif path.exists():
        if path.suffix not in _FILE_SUFFIXES:
            raise UsageError(f"{key}: {source} is no JSON-lines file by its name; {ALLOWED_SOURCES}")
        if path.stat().st_size == 0:
            raise UsageError(f"{key}: {source} is empty; it needs at least one row")
    elif path.suffix in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(source):
        raise UsageError(f"{key}: {source} does not exist; {ALLOWED_SOURCES}")


def read_records(source: str) -> Iterator[Record]:
    """Yield the rows of a source, in order.

    Args:
        source: path or hub name, see `ALLOWED_SOURCES`.

    Raises:
        UsageError: the source cannot be opened, or a line is no JSON object; the message names file and line.
    """
    return (record.parse() for record in read_raw_records(source))


def read_raw_records(source: str) -> Iterator[RawRecord]:
    """Yield the rows of a source, in order, and leave parsing to whoever takes them.

    Raises:
        UsageError: the source cannot be opened.
    """
    check_source(source, "data")
    if Path(source).is_file():
        yield from _read_lines(source)
    else:
        for number, row in enumerate(_open_dataset(source)):
            yield RawRecord(row, f"{source} row {number}")


def count_records(source: str) -> int:
    """Return how many rows a source has, for progress bars: blank lines of a file count too."""
    if not Path(source).is_file():
        return len(_open_dataset(source))
    with Path(source).open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def source_fingerprint(source: str) -> str:
    """Return a digest of the source's content: of a file's bytes, or the fingerprint that `datasets` keeps."""
    path = Path(source)
    if path.is_file():
        status = path.stat()
        return _file_digest(path.resolve(), status.st_size, status.st_mtime_ns)
    return str(_open_dataset(source)._fingerprint)


@functools.lru_cache(maxsize=16)
def _file_digest(path: Path, size: int, modified: int) -> str:
    """Hash a file once a process; size and time of change only tell when to hash it again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_lines(source: str) -> Iterator[RawRecord]:
    try:
        # Bytes, not text: a line that is no UTF-8 must be named, and text mode decodes ahead of the line it is at.
        file = Path(source).open("rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror}") from error
    with file as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield RawRecord(line, f"{source}:{number}")


def _parse_line(line: bytes, location: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(
            location, "not UTF-8", f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
        ) from error
    except json.JSONDecodeError as error:
        raise BadRow(
            location,
            "invalid JSON",
            f"invalid JSON: {error.msg} (column {error.colno}); each line must be one whole JSON object",
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise BadRow(location, "invalid JSON", f"invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRow(
            location, "no JSON object", f"expected a JSON object, one a line, found a JSON {type(value).__name__}"
        )
    return value


def _open_dataset(source: str) -> Dataset:
    import datasets

    if Path(source).is_dir():
        rows = Path(source) / ROWS_FILE
        try:
            return datasets.Dataset.from_file(str(rows)) if rows.is_file() else datasets.Dataset.load_from_disk(source)
        except Exception as error:  # datasets raises OSError, KeyError, ArrowInvalid ... for a damaged folder
            raise UsageError(f"{source}: cannot be read as a folder of rows: {_first_line(error)}") from error
    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # network, authorisation, unknown name or split: each its own class
        raise UsageError(
            f"{source}: no such file or folder here, and the hub data set cannot be loaded: {_first_line(error)}; "
            f"{ALLOWED_SOURCES}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
