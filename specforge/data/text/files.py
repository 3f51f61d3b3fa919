"""Streaming readers of row files: JSON lines, a JSON array or Parquet, optionally compressed by gzip."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow.parquet as pq

from specforge.data.text.json_array import read_array
from specforge.data.text.records import BYTE_ORDER_MARK, RawRecord
from specforge.errors import UsageError

LINES, JSON, PARQUET = ".jsonl", ".json", ".parquet"
_BLOCK = 1 << 20
_ROWS_AT_ONCE = 256  # of a Parquet file
_WIDE_TEXT = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")
_GZIP = b"\x1f\x8b"


def kind_of(path: Path) -> str | None:
    """Return the kind of a row file by its name, compressed or not; None for other files."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in (LINES, JSON, PARQUET) if name.endswith(kind)), None)


def read_file(path: Path) -> Iterator[RawRecord]:
    """Yield the rows of a file whose name has a known kind.

    Raises:
        UsageError: The file cannot be read or is damaged.
    """
    if kind_of(path) == PARQUET:
        with _open_parquet(path) as table:
            rows = (row for batch in table.iter_batches(_ROWS_AT_ONCE) for row in batch.to_pylist())
            yield from (RawRecord(row, f"{path} row {number}") for number, row in enumerate(rows))
        return
    with _open(path) as file:
        start = file.peek(len(BYTE_ORDER_MARK))
        if start.startswith(_WIDE_TEXT):
            raise UsageError(f"{path}: is UTF-16 or UTF-32 text; convert it to UTF-8, for example with iconv")
        if kind_of(path) == JSON and start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            yield from read_array(file, str(path))
        else:
            yield from (RawRecord(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip())


def count_rows(path: Path) -> int:
    """Return the number of rows of a file for progress bars, blank lines included.

    Raises:
        UsageError: The file cannot be read or is damaged.
    """
    if kind_of(path) == PARQUET:
        with _open_parquet(path) as table:
            return int(table.metadata.num_rows)
    if kind_of(path) == JSON:
        return sum(1 for _ in read_file(path))
    with _open(path) as lines:
        count, last = 0, b"\n"
        while block := lines.read(_BLOCK):
            count, last = count + block.count(b"\n"), block[-1:]
        return count + (last != b"\n")


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file and decompress it on the fly."""
    try:
        # Binary mode: errors must name a line that is not UTF-8, but text mode decodes ahead of the current line.
        with path.open("rb") as file:
            if file.peek(len(_GZIP)).startswith(_GZIP):
                with gzip.GzipFile(fileobj=file) as plain:
                    yield io.BufferedReader(cast(io.RawIOBase, plain), _BLOCK)
            else:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: the compressed file is truncated or damaged: {error}; replace it") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    with ExitStack() as closing:
        source: str | IO[bytes] = str(path)
        file = closing.enter_context(_open(path))
        if isinstance(file.raw, gzip.GzipFile):
            # Parquet is read from its end, so a compressed file has to be decompressed first.
            source = closing.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, source, _BLOCK)
        try:
            yield pq.ParquetFile(source, buffer_size=_BLOCK, page_checksum_verification=True)
        except Exception as error:  # pyarrow and its decoders each raise their own classes
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(f"{path}: the Parquet file is truncated or damaged: {lines[0]}; replace it") from error
