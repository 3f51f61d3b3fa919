"""Token rows on their way to disk: Arrow streams that grow batch by batch, and can be taken up again."""

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
    """Writes one folder of token rows.

    Args:
        folder: the folder, which exists.
        size: bytes of the rows' file to keep, from an earlier run; 0 starts with none.
        summary: what became of the rows in them.

    Attributes:
        summary: what became of the rows so far.
        checksum: of the rows so far.
    """

    def __init__(self, folder: Path, size: int = 0, summary: RowsSummary | None = None) -> None:
        self.folder = folder
        self.summary = summary or RowsSummary()
        # Unbuffered: what a run says it has written is out of its hands, and survives its end.
        self._file = (folder / ROWS_FILE).open("r+b" if size else "wb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)
        if size:
            self._parts = written_parts(folder / ROWS_FILE, size)
        else:
            schema = SCHEMA.serialize().to_pybytes()
            self._file.write(schema)
            self._parts = [schema_part(schema)]
        self.checksum = chained(self._parts)

    @property
    def size(self) -> int:
        """Bytes of the rows' file."""
        return self._file.tell()

    def append(self, batch: WrittenRows) -> None:
        """Add rows.

        Raises:
            OSError: they cannot be written.
        """
        left = memoryview(batch.message)
        while left:  # a disk that is nearly full takes a part, and refuses the next
            left = left[self._file.write(left) :]
        self._parts.append(batch_part(batch.message, batch.summary.rows))
        self.checksum = chained(self._parts[-1:], self.checksum)
        self.summary += batch.summary

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def finish(self, identity: Mapping[str, Any]) -> None:
        """Close the file and write the summary that vouches for it.

        Args:
            identity: what the rows are bound to, to be stored.
        """
        self.close()
        stored = {"summary": self.summary.to_json(), "checksums": self._parts, **identity}
        write_sealed(self.folder / SUMMARY_FILE, stored)


def chained(parts: Sequence[Part], before: int = 0) -> int:
    """Return a checksum of parts, which continues that of the parts before them."""
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
    """Stream sources into the folders of their splits, with a progress bar on a terminal.

    Args:
        sources: paths or hub names, read one after the other.
        maker: makes rows of them.
        writers: of each split.
        workers: processes.
        done: raw rows that an earlier run has finished, to be passed over.
        after_batch: called with the raw rows finished so far, whenever a batch of them is written.

    Raises:
        UsageError: a source is refused, or more of its rows are bad than may be; the message names file and line.
        SpecforgeError: a worker was ended from outside.
        OSError: the rows cannot be written.
    """
    records = islice(chain.from_iterable(map(read_raw_records, sources)), done, None)
    total, names = sum(map(count_records, sources)), ", ".join(sources)
    # disable=None shows the bar on a terminal only; delay hides it for short builds.
    with tqdm(desc="tokenising", unit=" rows", total=total, initial=done, disable=None, delay=2) as bar:
        for number, batches in make_batches(records, maker, workers):
            for split, batch in batches.items():
                writers[split].append(batch)
            # More than the share of all rows: what follows cannot mend it.
            writers[TRAIN].summary.require_few_bad(maker.settings, names, total)
            done += number
            after_batch(done)
            bar.update(number)
    writers[TRAIN].summary.require_few_bad(maker.settings, names)
