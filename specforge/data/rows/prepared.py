"""A folder of prepared rows: ``train`` and ``validation``, each a folder of token rows, and a summary of both.

The output is written into a hidden folder next to it, which is renamed at the end. The hidden folder records the
progress, so a killed run resumes and gives the same result as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from specforge.data.rows.building import identity_of, require_supervision
from specforge.data.rows.coverage import Coverage, coverage_by_size
from specforge.data.rows.maker import TRAIN, VALIDATION, RowMaker
from specforge.data.rows.reading import count_stored, is_whole
from specforge.data.rows.sealed import read_sealed, write_sealed
from specforge.data.rows.stored import ROWS_FILE, SUMMARY_FILE, written_parts
from specforge.data.rows.summary import RowsSummary
from specforge.data.rows.writing import RowsWriter, chain_checksum, write_rows
from specforge.data.text.sources import source_fingerprint
from specforge.errors import SpecforgeError, UsageError
from specforge.files import leftovers, locked, whole_file

_PROGRESS_FILE = "progress.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Contents of a folder of prepared rows.

    Attributes:
        identity: Digest of everything that the rows depend on.
        splits: Summaries of ``train`` and, if rows were held out, of ``validation``.
        coverage: Share of supervised tokens that a draft vocabulary covers, by its size.
    """

    identity: str
    splits: dict[str, RowsSummary]
    coverage: list[Coverage]

    @property
    def total(self) -> RowsSummary:
        """The summary of all splits together."""
        return sum(self.splits.values(), RowsSummary())

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the summary of a folder; None if it is not a folder of prepared rows."""
        try:
            values = read_sealed(folder / SUMMARY_FILE)
            splits = {split: RowsSummary.from_json(one) for split, one in values["splits"].items()}
            return cls(values["identity"], splits, [Coverage(**one) for one in values["coverage"]])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write the summary into a folder."""
        splits = {split: summary.to_json() for split, summary in self.splits.items()}
        values = {"identity": self.identity, "splits": splits, "coverage": [asdict(one) for one in self.coverage]}
        write_sealed(folder / SUMMARY_FILE, values, indent=2)


def prepare_rows(sources: Sequence[str], maker: RowMaker, output: Path, workers: int) -> Prepared:
    """Write a folder of prepared rows unless it already exists.

    Args:
        sources: Paths or hub names, read in this order.
        maker: Makes rows of them.
        output: The folder.
        workers: Number of processes; the result does not depend on it.

    Raises:
        UsageError: A source or a row is refused, no supervised token is left, or the folder holds something else.
        SpecforgeError: Another process is writing the folder, it cannot be written, or a worker was killed.
    """
    identity = json.dumps([maker.identity, *map(source_fingerprint, sources)])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    partial = output.with_name(f".{output.name}.partial")
    try:
        with locked(output):
            if existing := check_output(output):
                return _require_same(existing, digest, output)
            try:
                prepared = _write(partial, sources, maker, workers, digest)
            except UsageError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(output)
            return prepared
    except OSError as error:
        kept = f"; the finished part is kept in {partial}: fix this and run the same command again to resume"
        raise SpecforgeError(
            f"cannot write {output}: {error.strerror or error}{kept if partial.exists() else ''}"
        ) from error


def check_output(output: Path) -> Prepared | None:
    """Return the contents of an output folder; None if it is yet to be written.

    Raises:
        UsageError: The folder holds something else or cannot be made.
    """
    if not output.name or output.suffix in (".jsonl", ".json"):
        raise UsageError(f"--output: {output} is not a folder name; give a new folder")
    if file := next((parent for parent in output.parents if parent.is_file()), None):
        raise UsageError(f"--output: {output} cannot be created because {file} is a file; choose another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    prepared = Prepared.read(output)
    if prepared is None:
        raise UsageError(
            f"--output: {output} holds something else, or a damaged {SUMMARY_FILE}; choose another folder, or remove it"
        )
    return prepared


def _require_same(existing: Prepared, identity: str, output: Path) -> Prepared:
    if existing.identity != identity:
        raise UsageError(
            f"--output: {output} holds rows of other sources or settings; choose another folder, or remove it"
        )
    if not all(is_whole(output / split) for split in existing.splits):
        raise UsageError(f"--output: the rows in {output} are damaged; remove it and run the same command again")
    return existing


def _write(folder: Path, sources: Sequence[str], maker: RowMaker, workers: int, identity: str) -> Prepared:
    """Write the output into a folder, resuming earlier progress."""
    progress = _read_progress(folder, identity)
    if progress["done"]:
        _log.warning("resuming after %s rows of an earlier run", f"{progress['done']:,}")
        maker = maker.with_date(progress["date"])
    else:
        shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as closing:
        writers = {split: _open(folder / split, progress["splits"].get(split)) for split in maker.splits}
        for writer in writers.values():
            closing.callback(writer.close)

        date = maker.encoder.template.date if maker.encoder.template else ""

        def save_progress(done: int) -> None:
            sizes = {split: [one.size, one.summary.to_json(), one.checksum] for split, one in writers.items()}
            _write_progress(folder, {"identity": identity, "date": date, "done": done, "splits": sizes})

        write_rows(sources, maker, writers, workers, progress["done"], save_progress)
        summaries = {split: writer.summary for split, writer in writers.items()}
        require_supervision(summaries[TRAIN], ", ".join(sources))
        for writer in writers.values():
            writer.finish(identity_of(maker.encoder))
    if VALIDATION in summaries and not summaries[VALIDATION].rows:
        # With very few rows, chance may hold out none; rows dropped from validation still count.
        shutil.rmtree(folder / VALIDATION)
        summaries = {TRAIN: sum(summaries.values(), RowsSummary())}
    counts = {split: count_stored(folder / split, maker.encoder.vocabulary_size) for split in summaries}
    prepared = Prepared(identity, summaries, coverage_by_size(counts[TRAIN], counts.get(VALIDATION)))
    prepared.write(folder)
    for path in [folder / _PROGRESS_FILE, *leftovers(folder / _PROGRESS_FILE)]:
        path.unlink()
    return prepared


def _open(folder: Path, earlier: tuple[int, dict[str, Any], int] | None) -> RowsWriter:
    if earlier is None:
        folder.mkdir(parents=True)
        return RowsWriter(folder)
    size, summary, _ = earlier
    return RowsWriter(folder, size, RowsSummary.from_json(summary))


def _read_progress(folder: Path, identity: str) -> dict[str, Any]:
    """Return the progress of an earlier run with the same sources and settings."""
    try:
        progress = read_sealed(folder / _PROGRESS_FILE)
        if progress["identity"] == identity:
            for split, (size, _, checksum) in progress["splits"].items():
                # A crashed machine may have lost data that it reported as written.
                if chain_checksum(written_parts(folder / split / ROWS_FILE, size)) != checksum:
                    raise ValueError("the rows are damaged")
            return progress
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"done": 0, "splits": {}}


def _write_progress(folder: Path, progress: dict[str, Any]) -> None:
    with whole_file(folder / _PROGRESS_FILE, durable=False) as file:
        write_sealed(file, progress)
