"""Token rows in a folder: an Arrow stream, each batch of which is checked against a checksum when it is first read.

Arrow trusts what it reads: a flipped bit in a value would be trained on, one in a header may crash the process.
The header and row offsets of each batch, which are small, are therefore checked when the folder is opened, before
Arrow reads them. The rest of a batch is checked when one of its rows is first read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from specforge.data.rows.mapped import require_size
from specforge.data.rows.sealed import read_sealed
from specforge.errors import SpecforgeError, UsageError

ROWS_FILE = "rows.arrow"
SUMMARY_FILE = "summary.json"
_PREFIX = 8  # bytes of a message before its header: a marker, and the header's size
_OFFSET = 4  # bytes


class Part(NamedTuple):
    """A message of the stream: the schema, or a batch.

    Attributes:
        size: Size in bytes.
        head: Bytes up to the end of the offsets of its first column; the whole message for a schema.
        head_checksum: CRC-32 of the head.
        rest_checksum: CRC-32 of the rest.
    """

    size: int
    head: int
    head_checksum: int
    rest_checksum: int


def to_numpy(array: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return numbers or booleans without nulls as a NumPy array, numbers as a read-only view.

    Arrow's own conversion imports pandas first.
    """
    whole = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_boolean(whole.type):  # a bit each
        return np.from_dlpack(whole.cast(pa.uint8())).astype(np.bool_)
    return np.from_dlpack(whole)


def schema_part(message: bytes | memoryview) -> Part:
    """Return the part of a schema message."""
    return Part(len(message), len(message), zlib.crc32(message), 0)


def batch_part(message: bytes | memoryview, rows: int) -> Part:
    """Return the part of a batch message whose columns are lists."""
    view = memoryview(message)
    header = int.from_bytes(view[4:_PREFIX], "little")
    head = min(_PREFIX + header + _OFFSET * (rows + 1), len(view))
    return Part(len(view), head, zlib.crc32(view[:head]), zlib.crc32(view[head:]))


def written_parts(path: Path, size: int) -> list[Part]:
    """Return the parts of the first ``size`` bytes of a rows file that has no summary yet.

    Raises:
        OSError, ValueError: The bytes are not complete messages.
    """
    with pa.memory_map(str(path)) as file:
        buffer = file.read_buffer(size)
    reader, view = pa.BufferReader(buffer), memoryview(buffer)
    schema = pa.ipc.read_schema(reader)
    parts, begin = [schema_part(view[: reader.tell()])], reader.tell()
    while begin < size:
        rows = pa.ipc.read_record_batch(pa.ipc.read_message(reader), schema).num_rows
        parts.append(batch_part(view[begin : reader.tell()], rows))
        begin = reader.tell()
    return parts


class StoredRows:
    """The rows of a folder, read through a memory map.

    Args:
        folder: Holds ``rows.arrow`` and the summary with its checksums.

    Attributes:
        folder: As given.
        description: Content of the summary.

    Raises:
        UsageError: Rows or checksums are missing, or a header is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / ROWS_FILE
        try:
            self.description = read_sealed(folder / SUMMARY_FILE)
            self._parts = [Part(*part) for part in self.description["checksums"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{folder / SUMMARY_FILE}: damaged, missing, or of an earlier version ({error}); prepare the rows again"
            ) from error
        try:
            with pa.memory_map(str(self._path)) as file:
                self._bytes = file.read_buffer()
        except (OSError, ValueError) as error:
            raise UsageError(f"{self._path}: cannot be read: {error}; prepare the rows again") from error
        self._begins = np.cumsum([0, *(part.size for part in self._parts)]).tolist()
        view, size = memoryview(self._bytes), self._begins[-1]
        if len(view) != size:
            raise UsageError(self._damaged(f"the file has {len(view):,} bytes instead of {size:,}"))
        for part, begin in zip(self._parts, self._begins, strict=False):
            if zlib.crc32(view[begin : begin + part.head]) != part.head_checksum:
                raise UsageError(self._damaged(f"bytes {begin:,} to {begin + part.head:,} differ from their checksum"))
        schema, *batches = map(self._bytes.slice, self._begins, [part.size for part in self._parts])
        self.schema = pa.ipc.read_schema(schema)
        self._batches = [pa.ipc.read_record_batch(batch, self.schema) for batch in batches]
        self._first_rows = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._is_checked = [False] * len(self._batches)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows as Python values, read a batch at a time."""
        for table in self.tables():
            yield from table.to_pylist()

    def __reduce__(self) -> tuple[type[StoredRows], tuple[Path]]:
        return StoredRows, (self.folder,)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row, int64 [rows]."""
        parts = [to_numpy(pc.list_value_length(batch.column(0))) for batch in self._batches]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """A digest of the content."""
        return hashlib.sha256(json.dumps(self._parts).encode()).hexdigest()

    def tables(self) -> Iterator[pa.Table]:
        """Yield all rows in order, one written batch at a time.

        Raises:
            SpecforgeError: The rows are damaged.
        """
        return (pa.Table.from_batches([self._batch(n)]) for n, batch in enumerate(self._batches) if batch.num_rows)

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """Return some rows, in the order given.

        Raises:
            SpecforgeError: The rows are damaged.
        """
        require_size(self.folder / ROWS_FILE, len(self._bytes))
        batches = self._first_rows.searchsorted(rows, side="right") - 1
        within = rows - self._first_rows[batches]
        chosen = zip(batches.tolist(), within.tolist(), strict=True)
        return pa.Table.from_batches([self._batch(batch).slice(row, 1) for batch, row in chosen], self.schema)

    def check(self) -> None:
        """Check all rows.

        Raises:
            SpecforgeError: Some are damaged.
        """
        for number in range(len(self._batches)):
            self._batch(number)

    def _batch(self, number: int) -> pa.RecordBatch:
        if not self._is_checked[number]:
            require_size(self.folder / ROWS_FILE, len(self._bytes))
            begin, part = self._begins[number + 1], self._parts[number + 1]
            rest = memoryview(self._bytes)[begin + part.head : begin + part.size]
            if zlib.crc32(rest) != part.rest_checksum:
                first, last = self._first_rows[number], self._first_rows[number + 1] - 1
                raise SpecforgeError(self._damaged(f"rows {first:,} to {last:,} differ from their checksum"))
            self._is_checked[number] = True
        return self._batches[number]

    def _damaged(self, how: str) -> str:
        return f"{self._path}: the rows are damaged: {how}; remove {self.folder} and prepare the rows again"
