"""Where rows come from: a JSON-lines file, a folder of `datasets.save_to_disk`, or a data set on the hub."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

ALLOWED_SOURCES = (
    "allowed: a .jsonl or .json file with one JSON object a line, a folder written by datasets.save_to_disk, "
    "or a hub data set as owner/name or owner/name:split"
)
_FILE_SUFFIXES = (".jsonl", ".json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w\[\]%:+.-]+)?")


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row and the place to name when it is refused, such as `train.jsonl:12`."""

    value: dict[str, Any]
    location: str


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
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            raise UsageError(f"{key}: {source} holds several splits; name one of {[f'{source}/{s}' for s in splits]}")
        if not (path / "state.json").is_file():
            raise UsageError(f"{key}: {source} is a folder that datasets.save_to_disk did not write; {ALLOWED_SOURCES}")
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
    check_source(source, "data")
    if Path(source).is_file():
        yield from _read_json_lines(source)
    else:
        for number, row in enumerate(_open_dataset(source)):
            yield Record(row, f"{source} row {number}")


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


def _read_json_lines(source: str) -> Iterator[Record]:
    try:
        # Bytes, not text: a line that is no UTF-8 must be named, and text mode decodes ahead of the line it is at.
        file = Path(source).open("rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror}") from error
    with file as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                location = f"{source}:{number}"
                yield Record(_parse_line(line, location), location)


def _parse_line(line: bytes, location: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{location}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{location}: invalid JSON: {error.msg} (column {error.colno}); each line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UsageError(f"{location}: invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{location}: expected a JSON object, one a line, found a JSON {type(value).__name__}")
    return value


def _open_dataset(source: str) -> Dataset:
    import datasets

    if Path(source).is_dir():
        try:
            return datasets.Dataset.load_from_disk(source)
        except Exception as error:  # datasets raises OSError, KeyError, ArrowInvalid ... for a damaged folder
            raise UsageError(f"{source}: cannot be read as a datasets folder: {_first_line(error)}") from error
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
