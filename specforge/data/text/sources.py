"""Sources of rows: files, a folder of token rows, of files or of ``datasets``, or a data set on the hub."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from specforge.data.rows.stored import ROWS_FILE, StoredRows
from specforge.data.text.files import JSON, LINES, PARQUET, count_rows, kind_of, read_file
from specforge.data.text.records import RawRecord, Record
from specforge.errors import UsageError, nearest_path
from specforge.private.datasets import fingerprint_of

if TYPE_CHECKING:
    from datasets import Dataset

ALLOWED_SOURCES = (
    "allowed: a .jsonl file with one JSON object per line, a .json file of the same or of one array, a .parquet file, "
    "each also as .gz; a folder of .jsonl or .parquet files, or a file pattern with *; a folder written by "
    "specforge prepare rows or by datasets.save_to_disk; a hub data set as owner/name or owner/name:split"
)
# The words of the command that writes a file or folder of this name.
_WRITERS = {"train": "rows SOURCE", "validation": "rows SOURCE", "responses.jsonl": "responses PROMPTS"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w\[\]%:+.-]+)?")
_SHARD_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}\b.*")  # the hub's naming of a split's files


def check_source(source: str, key: str) -> None:
    """Refuse an unreadable source before anything is loaded.

    Args:
        source: Path or hub name, as given by the user.
        key: Configuration key to name in the message, such as ``data.train``.

    Raises:
        UsageError: A file is missing or empty, or a folder holds no rows or several splits.
    """
    path = Path(source)
    if (path / ROWS_FILE).is_file():
        return
    if splits := sorted(str(file.parent) for file in path.glob(f"*/{ROWS_FILE}")):
        raise UsageError(f"{key}: {source} holds several sets of rows; name one of {splits}")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(str(file.parent) for file in path.glob("*/state.json"))
        raise UsageError(f"{key}: {source} holds several splits; name one of {splits}")
    if (path / "state.json").is_file():
        return
    files = source_files(source)
    if path.is_file() and kind_of(path) is None:
        raise UsageError(f"{key}: {source} has no suffix of a row file; {ALLOWED_SOURCES}")
    if empty := next((file for file in files if file.stat().st_size == 0), None):
        raise UsageError(f"{key}: {empty} is empty; it needs at least one row")
    if path.is_dir() and not files:
        below = sorted(str(folder) for folder in path.iterdir() if folder.is_dir() and source_files(str(folder)))
        hint = f"; did you mean one of {below}?" if below else ""
        raise UsageError(f"{key}: {source} is a folder without rows{hint}; {ALLOWED_SOURCES}")
    splits = sorted({match[1] for file in files if (match := _SHARD_NAME.fullmatch(file.name))})
    if len(splits) > 1:
        patterns = [str(files[0].with_name(f"{split}-*")) for split in splits]
        raise UsageError(f"{key}: {source} holds several splits; name one of {patterns}")
    if not files and (kind_of(path) or "*" in source or not _HUB_NAME.fullmatch(source)):
        raise UsageError(f"{key}: {source} does not exist; {_remedy(path)}")


def source_files(source: str) -> list[Path]:
    """Return the files of a source in order; empty for token rows, ``datasets`` and the hub."""
    path = Path(source)
    if path.is_file():
        return [path]
    pattern = f"{glob.escape(source)}/*" if path.is_dir() else source if "*" in source else ""
    # In a folder of rows, .json files hold metadata, such as `dataset_infos.json`.
    kinds = {LINES, PARQUET} if path.is_dir() else {LINES, PARQUET, JSON}
    return sorted(file for file in map(Path, glob.glob(pattern)) if kind_of(file) in kinds and file.is_file())


def read_records(source: str) -> Iterator[Record]:
    """Yield the rows of a source in order.

    Args:
        source: Path or hub name, see ``ALLOWED_SOURCES``.

    Raises:
        UsageError: The source cannot be opened, or a line is not a JSON object; the message names file and line.
    """
    return (record.parse() for record in read_raw_records(source))


def read_raw_records(source: str) -> Iterator[RawRecord]:
    """Yield the unparsed rows of a source in order.

    Raises:
        UsageError: The source cannot be opened.
    """
    check_source(source, "data")
    if files := source_files(source):
        for file in files:
            yield from read_file(file)
    else:
        for number, row in enumerate(_open_rows(source)):
            yield RawRecord(row, f"{source} row {number}")


def count_records(source: str) -> int:
    """Return the number of rows of a source for progress bars, blank lines included."""
    files = source_files(source)
    return sum(map(count_rows, files)) if files else len(_open_rows(source))


def source_fingerprint(source: str) -> str:
    """Return a digest of the source's content: a hash of its files, or the fingerprint that ``datasets`` keeps."""
    files = source_files(source)
    if not files:
        rows = _open_rows(source)
        return rows.fingerprint if isinstance(rows, StoredRows) else fingerprint_of(rows)
    digests = [_file_digest(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(json.dumps(digests).encode()).hexdigest()


@functools.lru_cache(maxsize=16)
def _file_digest(path: Path, size: int, modified: int) -> str:
    """Hash a file once per process; a changed size or modification time causes a new hash."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _open_rows(source: str) -> StoredRows | Dataset:
    if (Path(source) / ROWS_FILE).is_file():
        return StoredRows(Path(source))
    import datasets

    if Path(source).is_dir():
        try:
            return datasets.Dataset.load_from_disk(source)
        except Exception as error:  # datasets raises OSError, KeyError, ArrowInvalid ... for a damaged folder
            raise UsageError(f"{source}: cannot be read as a datasets folder: {_first_line(error)}") from error
    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # network, authorisation, unknown name or split each raise their own class
        raise UsageError(
            f"{source}: no such file or folder, and the hub data set cannot be loaded: {_first_line(error)}; "
            f"{_remedy(Path(source))}"
        ) from error


def _remedy(path: Path) -> str:
    """Return what to do about a missing source: the command that writes it, if its name tells, or what to give."""
    words = _WRITERS.get(path.name)
    if words is not None and path.parent != Path():
        return f"to write it: specforge prepare {words} --verifier MODEL --output {path.parent}"
    if kind_of(path) is not None:
        return f"give an existing file (working directory {Path.cwd()}).{nearest_path(path)}"
    return ALLOWED_SOURCES


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
