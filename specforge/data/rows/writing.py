"""Writing token rows as Arrow streams that grow batch by batch and can be resumed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specforge.data.rows.maker import SCHEMA, TRAIN, RowMaker, WrittenRows
from specforge.data.rows.sealed import write_sealed
from specforge.data.rows.stored import ROWS_FILE, SUMMARY_FILE, Part, batch_part, schema_part, written_parts
from specforge.data.rows.summary import RowsSummary
from specforge.data.rows.workers import make_batches
from specforge.data.text.sources import count_records, read_raw_records


class RowsWriter:
    """Writes a folder of token rows.

    Args:
        folder: An existing folder.
        size: Bytes of the rows file to keep from an earlier run; 0 starts from scratch.
        summary: Summary of the rows in these bytes.

    Attributes:
        summary: Summary of the rows so far.
        checksum: Checksum of the rows so far.
    """

    def __init__(self, folder: Path, size: int = 0, summary: RowsSummary | None = None) -> None:
        self.folder = folder
        self.summary = summary or RowsSummary()
        # Unbuffered: whatever is reported as written survives the end of the process.
        self._file = (folder / ROWS_FILE).open("r+b" if size else "wb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)
        if size:
            self._parts = written_parts(folder / ROWS_FILE, size)
        else:
            schema = SCHEMA.serialize().to_pybytes()
            self._file.write(schema)
            self._parts = [schema_part(schema)]
        self.checksum = chain_checksum(self._parts)

    @property
    def size(self) -> int:
        """Size of the rows file in bytes."""
        return self._file.tell()

    def append(self, batch: WrittenRows) -> None:
        """Add rows.

        Raises:
            OSError: The rows cannot be written.
        """
        left = memoryview(batch.message)
        while left:  # a nearly full disk accepts part of the data before it refuses
            left = left[self._file.write(left) :]
        self._parts.append(batch_part(batch.message, batch.summary.rows))
        self.checksum = chain_checksum(self._parts[-1:], self.checksum)
        self.summary += batch.summary

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def finish(self, identity: Mapping[str, Any]) -> None:
        """Close the file and write the summary with its checksums.

        Args:
            identity: Metadata of the rows to store, see ``identity_of``.
        """
        self.close()
        stored = {"summary": self.summary.to_json(), "checksums": self._parts, **identity}
        write_sealed(self.folder / SUMMARY_FILE, stored)


def chain_checksum(parts: Sequence[Part], before: int = 0) -> int:
    """Return a checksum of parts that continues the checksum of earlier parts."""
    for part in parts:
        before = zlib.crc32(json.dumps(part).encode(), before)
    return before


def write_rows(
    sources: Sequence[str],
    maker: RowMaker,
    writers: Mapping[str, RowsWriter],
    workers: int = 1,
    done: int = 0,
    after_batch: Callable[[int], None] = lambda done: None,
) -> None:
    """Stream sources into the folders of the splits, with a progress bar on a terminal.

    Args:
        sources: Paths or hub names, read in this order.
        maker: Makes the rows.
        writers: The writer of each split.
        workers: Number of processes.
        done: Number of raw rows that an earlier run finished, which are skipped.
        after_batch: Called after each written batch with the number of raw rows finished so far.

    Raises:
        UsageError: A source is refused, or too many of its rows are bad; the message names file and line.
        SpecforgeError: A worker was killed.
        OSError: The rows cannot be written.
    """
    records = islice(chain.from_iterable(map(read_raw_records, sources)), done, None)
    total, names = sum(map(count_records, sources)), ", ".join(sources)
    # disable=None shows the bar on a terminal only; delay hides it for short builds.
    with tqdm(desc="tokenising", unit=" rows", total=total, initial=done, disable=None, delay=2) as bar:
        for number, batches in make_batches(records, maker, workers):
            for split, batch in batches.items():
                writers[split].append(batch)
            # Already more than the allowed share of all rows: fail early.
            writers[TRAIN].summary.require_few_bad(maker.settings, names, total)
            done += number
            after_batch(done)
            bar.update(number)
    writers[TRAIN].summary.require_few_bad(maker.settings, names)
