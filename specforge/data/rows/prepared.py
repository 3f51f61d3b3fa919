"""A folder of prepared rows: `train` and `validation`, each a folder of token rows, and a summary of both.

All of it is written into a hidden neighbour and renamed at the end. What lies in the neighbour says how far it is, so
that a run that was killed is taken up where it ended, and the result is that of one that was not.
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
from specforge.data.rows.writing import RowsWriter, chained, write_rows
from specforge.data.text.sources import source_fingerprint
from specforge.errors import SpecforgeError, UsageError
from specforge.files import leftovers, locked, whole_file

_PROGRESS_FILE = "progress.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a folder of prepared rows holds.

    Attributes:
        identity: digest of all that the rows depend on.
        splits: what became of the rows of `train` and, if any were held out, of `validation`.
        coverage: supervised tokens that a draft vocabulary covers, by its size.
    """

    identity: str
    splits: dict[str, RowsSummary]
    coverage: list[Coverage]

    @property
    def total(self) -> RowsSummary:
        """What became of the sources."""
        return sum(self.splits.values(), RowsSummary())

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the summary of a folder; None where it is none of prepared rows."""
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
    """Write a folder of prepared rows, unless it is there already.

    Args:
        sources: paths or hub names, read one after the other.
        maker: makes rows of them.
        output: the folder.
        workers: processes; the result does not depend on their number.

    Raises:
        UsageError: a source or a row is refused, no supervised token is left, or the folder holds something else.
        SpecforgeError: another process writes the folder, it cannot be written, or a worker was ended from outside.
    """
    identity = json.dumps([maker.identity, *map(source_fingerprint, sources)])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    partial = output.with_name(f".{output.name}.partial")
    try:
        with locked(output):
            if there := check_output(output):
                return _require_same(there, digest, output)
            try:
                prepared = _write(partial, sources, maker, workers, digest)
            except UsageError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(output)
            return prepared
    except OSError as error:
        kept = f"; what is done so far stays in {partial}: mend that and run the same command again to go on"
        raise SpecforgeError(
            f"cannot write {output}: {error.strerror or error}{kept if partial.exists() else ''}"
        ) from error


def check_output(output: Path) -> Prepared | None:
    """Return what an output folder holds; None where it is yet to be written.

    Raises:
        UsageError: something else is there.
    """
    if not output.name:
        raise UsageError(f"--output: {output} is no name for a folder; give one that is yet to be made")
    if file := next((parent for parent in output.parents if parent.is_file()), None):
        raise UsageError(f"--output: {output} cannot be made, since {file} is a file; choose another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    prepared = Prepared.read(output)
    if prepared is None:
        raise UsageError(
            f"--output: {output} holds something else, or a damaged {SUMMARY_FILE}; choose another folder, or remove it"
        )
    return prepared


def _require_same(there: Prepared, identity: str, output: Path) -> Prepared:
    if there.identity != identity:
        raise UsageError(
            f"--output: {output} holds rows of other sources or settings; choose another folder, or remove it"
        )
    if not all(is_whole(output / split) for split in there.splits):
        raise UsageError(f"--output: the rows in {output} are damaged; remove it and run the same command again")
    return there


def _write(folder: Path, sources: Sequence[str], maker: RowMaker, workers: int, identity: str) -> Prepared:
    """Write all of the output into a folder, or what is left of it."""
    progress = _read_progress(folder, identity)
    if progress["done"]:
        _log.warning("going on after %s rows of an earlier run", f"{progress['done']:,}")
        maker = maker.on(progress["date"])
    else:
        shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as closing:
        writers = {split: _open(folder / split, progress["splits"].get(split)) for split in maker.splits}
        for writer in writers.values():
            closing.callback(writer.close)

        date = maker.encoder.template.date if maker.encoder.template else ""

        def note(done: int) -> None:
            sizes = {split: [one.size, one.summary.to_json(), one.checksum] for split, one in writers.items()}
            _write_progress(folder, {"identity": identity, "date": date, "done": done, "splits": sizes})

        write_rows(sources, maker, writers, workers, progress["done"], note)
        summaries = {split: writer.summary for split, writer in writers.items()}
        require_supervision(summaries[TRAIN], ", ".join(sources))
        for writer in writers.values():
            writer.finish(identity_of(maker.encoder))
    if VALIDATION in summaries and not summaries[VALIDATION].rows:
        # The rows are so few that chance held out none; those that it dropped still count.
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
    """Return how far an earlier run of the same sources and settings came."""
    try:
        progress = read_sealed(folder / _PROGRESS_FILE)
        if progress["identity"] == identity:
            for split, (size, _, checksum) in progress["splits"].items():
                # A machine that went down may have lost what it had promised to write.
                if chained(written_parts(folder / split / ROWS_FILE, size)) != checksum:
                    raise ValueError("the rows are damaged")
            return progress
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"done": 0, "splits": {}}


def _write_progress(folder: Path, progress: dict[str, Any]) -> None:
    with whole_file(folder / _PROGRESS_FILE, durable=False) as file:
        write_sealed(file, progress)
