"""Token rows on disk: built once from a source, cached by content, read through a memory map."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from specforge.data.cache import ensure_folder
from specforge.data.recipe import FORMAT, TRAIN, Recipe
from specforge.data.stored_rows import ROWS_FILE, StoredRows
from specforge.data.summary import RowSettings, RowsSummary
from specforge.data.text.bad_rows import BadRow
from specforge.data.text.encoding import RowEncoder, holds_tokens
from specforge.data.text.records import Record
from specforge.data.text.sources import read_raw_records, source_fingerprint
from specforge.data.text.template import arguments_advice
from specforge.data.writing import RowsWriter, write_rows
from specforge.errors import SpecforgeError, UsageError

if TYPE_CHECKING:
    from specforge.data.text.template import ChatTemplate


class TokenRows:
    """Tokenised rows, read from disk as they are needed.

    Args:
        stored: columns `input_ids` (lists of int32), `loss_mask` (lists of bool) and `chat` (int64).
        summary: what became of the source.
        vocabulary_size: number of ids of the verifier, V.
        chosen: indices of the rows to take; None for all.
    """

    def __init__(
        self,
        stored: StoredRows,
        summary: RowsSummary,
        vocabulary_size: int,
        chosen: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.summary = summary
        self.vocabulary_size = vocabulary_size
        self._stored = stored
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._stored if self._chosen is None else self._chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids` int64 [T] and `loss_mask` bool [T] of one row."""
        return self.join([index])[0]

    def join(self, indices: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Read some rows, one behind the other.

        Returns:
            `input_ids` int64 [T] and `loss_mask` bool [T] of all of them, and the tokens of each, int64 [rows].

        Raises:
            SpecforgeError: they are damaged.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        rows = self._stored.take(wanted if self._chosen is None else self._chosen[wanted])
        ids, mask = rows["input_ids"].combine_chunks(), rows["loss_mask"].combine_chunks()
        joined = {
            "input_ids": torch.from_numpy(ids.flatten().to_numpy().astype(np.int64)),
            "loss_mask": torch.from_numpy(mask.flatten().to_numpy(zero_copy_only=False)),
        }
        return joined, torch.from_numpy(ids.value_lengths().to_numpy().astype(np.int64))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, int64 [rows]."""
        return self._stored.lengths if self._chosen is None else self._stored.lengths[self._chosen]

    @cached_property
    def chats(self) -> npt.NDArray[np.int64]:
        """The chat of each row, int64 [rows]: equal for rows that are turns of one."""
        return np.concatenate([batch["chat"].to_numpy() for batch in self._batches()])

    @cached_property
    def supervised_counts(self) -> Tensor:
        """How often each id is supervised, int64 [V]."""
        return _count_supervised(self._batches(), self.vocabulary_size)

    @cached_property
    def digests(self) -> npt.NDArray[np.uint64]:
        """What tells the tokens of each row from those of any other, uint64 [rows, 2]."""
        digests = []
        for batch in self._batches():
            ids = pc.list_flatten(batch["input_ids"]).to_numpy()
            ends = np.cumsum(pc.list_value_length(batch["input_ids"]).to_numpy())
            digests += [row_digest(one) for one in np.split(ids, ends[:-1])]
        return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)

    @cached_property
    def last_supervised(self) -> npt.NDArray[np.int64]:
        """Place of the last supervised token of each row, int64 [rows]; -1 where none is."""
        places = []
        for batch in self._batches():
            lengths = pc.list_value_length(batch["loss_mask"]).to_numpy()
            starts = np.cumsum(lengths) - lengths
            mask = pc.list_flatten(batch["loss_mask"]).to_numpy()
            within = np.arange(len(mask)) - np.repeat(starts, lengths)
            places.append(np.maximum.reduceat(np.where(mask, within, -1), starts))
        return np.concatenate(places).astype(np.int64)

    def select(self, indices: npt.NDArray[np.int64]) -> TokenRows:
        """Return some of the rows; `truncated` and `dropped` of the summary still tell of the whole source."""
        rows = indices if self._chosen is None else self._chosen[indices]
        chosen = TokenRows(self._stored, self.summary, self.vocabulary_size, rows)
        tokens, supervised_tokens = int(chosen.lengths.sum()), int(chosen.supervised_counts.sum())
        chosen.summary = replace(self.summary, rows=len(chosen), tokens=tokens, supervised_tokens=supervised_tokens)
        return chosen

    def _batches(self) -> Iterator[pa.Table]:
        if self._chosen is None:
            return self._stored.tables()
        return map(self._stored.take, np.split(self._chosen, range(1024, len(self), 1024)))


def row_digest(input_ids: npt.NDArray[Any]) -> bytes:
    """Return 16 bytes that tell a row's tokens from any others."""
    return hashlib.blake2b(input_ids.astype("<i4", copy=False).tobytes(), digest_size=16).digest()


def build_rows(
    source: str,
    load_template: Callable[[], ChatTemplate],
    vocabulary_size: int,
    settings: RowSettings,
    cache_dir: Path,
) -> TokenRows:
    """Return the token rows of a source: as they lie there, if it is a folder of them, or else through the cache.

    Args:
        source: path or hub name, see `specforge.data.text.sources`.
        load_template: returns the verifier's chat template; not called where the source holds tokens of any tokenizer.
        vocabulary_size: number of ids of the verifier.
        settings: what is done with long rows, and with bad ones.
        cache_dir: folder of the caches; the rows lie in a folder named by all that they depend on.

    Raises:
        UsageError: too many rows are bad (the message names the first by file and line), no supervised token is left,
            or a folder of rows is damaged, was made for another verifier, or holds rows that are too long.
        SpecforgeError: the cache cannot be written.
    """
    if (Path(source) / ROWS_FILE).is_file():
        rows = _prepared_rows(Path(source), load_template, vocabulary_size, settings.max_length)
    else:
        recipe = Recipe(make_encoder([source], load_template, vocabulary_size), settings)
        folder = _cache_folder(source, recipe, cache_dir)
        ensure_folder(folder, lambda target: _write_rows(target, source, recipe), is_whole)
        rows = open_rows(folder, vocabulary_size)
        rows.summary.require_few_bad(settings, source)
    # The first token of a row has nothing before it: a mask of all ones may leave it out.
    if rows.summary.supervised_tokens >= rows.summary.tokens - rows.summary.rows:
        warnings.warn(f"{source}: every token is supervised; is that meant, or is the loss mask missing?", stacklevel=2)
    return rows


def is_built(
    source: str,
    load_template: Callable[[], ChatTemplate],
    vocabulary_size: int,
    settings: RowSettings,
    cache_dir: Path,
) -> bool:
    """Tell whether ``build_rows`` would find the rows of a source ready; the arguments are the same."""
    if (Path(source) / ROWS_FILE).is_file():
        return True
    recipe = Recipe(make_encoder([source], load_template, vocabulary_size), settings)
    return is_whole(_cache_folder(source, recipe, cache_dir))


def make_encoder(sources: Sequence[str], load_template: Callable[[], ChatTemplate], vocabulary_size: int) -> RowEncoder:
    """Return the encoder of some sources; it goes without a tokenizer where all their first rows hold tokens.

    Args:
        sources: paths or hub names.
        load_template: returns the verifier's chat template.
        vocabulary_size: number of ids of the verifier.

    Raises:
        UsageError: a source holds no rows that can be parsed.
    """
    holds_texts = not all(holds_tokens(_first_record(source)) for source in sources)
    return RowEncoder(load_template() if holds_texts else None, vocabulary_size)


def _first_record(source: str) -> Record:
    """Return the first row that can be parsed."""
    bad = None
    for raw in read_raw_records(source):
        try:
            return raw.parse()
        except BadRow as error:
            bad = bad or error
    raise bad or UsageError(f"{source}: holds no rows")


def identity_of(encoder: RowEncoder) -> dict[str, Any]:
    """Return what a folder of rows stores of how it was made: its format, and what it needs of a verifier."""
    template = encoder.template
    return {
        "format": FORMAT,
        "vocabulary_size": encoder.vocabulary_size,
        "tokenizer": encoder.tokenizer_digest,
        "template_arguments": template and template.arguments,
        "template_date": template.date if template and template.prints_date else None,
    }


def open_rows(folder: Path, vocabulary_size: int) -> TokenRows:
    """Open a folder of rows.

    Raises:
        UsageError: they are damaged.
    """
    return _read(StoredRows(folder), vocabulary_size)


def _read(stored: StoredRows, vocabulary_size: int) -> TokenRows:
    return TokenRows(stored, RowsSummary.from_json(stored.description["summary"]), vocabulary_size)


def count_stored(folder: Path, vocabulary_size: int) -> Tensor:
    """Return how often each id is supervised in a folder of rows, int64 [V].

    The rows are read one batch after the other, not through a memory map, in which all of them would stay resident.
    """
    with pa.OSFile(str(folder / ROWS_FILE)) as file, pa.ipc.open_stream(file) as batches:
        return _count_supervised(batches, vocabulary_size)


def is_whole(folder: Path) -> bool:
    """Tell whether a folder holds all the rows that its summary speaks of, as they were written."""
    try:
        StoredRows(folder).check()
    except SpecforgeError:
        return False
    return True


def require_supervision(summary: RowsSummary, source: str) -> None:
    """Refuse rows that teach nothing.

    Raises:
        UsageError: no token is supervised.
    """
    if not summary.supervised_tokens:
        reasons = ", ".join(f"{count:,} ({reason})" for reason, count in summary.dropped.items())
        raise UsageError(f"{source}: no supervised token in the whole set; rows dropped: {reasons or 'none'}")


def _count_supervised(batches: Iterable[pa.Table | pa.RecordBatch], vocabulary_size: int) -> Tensor:
    counts = np.zeros(vocabulary_size, dtype=np.int64)
    for batch in batches:
        supervised = pc.list_flatten(batch["input_ids"]).filter(pc.list_flatten(batch["loss_mask"]))
        counts += np.bincount(supervised.to_numpy(), minlength=vocabulary_size)
    return torch.from_numpy(counts)


def _cache_folder(source: str, recipe: Recipe, cache_dir: Path) -> Path:
    identity = json.dumps([source_fingerprint(source), recipe.identity])
    return cache_dir / hashlib.sha256(identity.encode()).hexdigest()


def _prepared_rows(
    folder: Path, load_template: Callable[[], ChatTemplate], vocabulary_size: int, max_length: int
) -> TokenRows:
    """Open a folder of rows, and make sure that it suits the run."""
    opened = StoredRows(folder)
    stored = opened.description
    if stored.get("format") != FORMAT:
        raise UsageError(f"{folder}: the rows were prepared by another version of specforge; prepare them again")
    if stored.get("vocabulary_size") != vocabulary_size:
        raise UsageError(
            f"{folder}: the rows were prepared for a verifier of {stored.get('vocabulary_size')} ids, this one has "
            f"{vocabulary_size}; prepare them for this verifier"
        )
    if stored.get("tokenizer"):
        template = load_template()
        if stored["tokenizer"] != RowEncoder(template, vocabulary_size).tokenizer_digest:
            raise UsageError(
                f"{folder}: the rows were prepared with another tokenizer or chat template than this verifier's; "
                "prepare them for this verifier"
            )
        arguments = stored.get("template_arguments") or {}
        if arguments != template.arguments:
            raise UsageError(
                f"{folder}: the rows were prepared with the template arguments {arguments}, this run has "
                f"{template.arguments}; {arguments_advice(arguments).replace('--', '--data.')}"
            )
    rows = _read(opened, vocabulary_size)
    longest = int(rows.lengths.max())
    if longest > max_length:
        raise UsageError(
            f"{folder}: the longest row has {longest} tokens, max_length is {max_length}; raise it to {longest}, or "
            "prepare the rows with a shorter --max_length"
        )
    return rows


def _write_rows(folder: Path, source: str, recipe: Recipe) -> None:
    """Write a folder of the cache."""
    writer = RowsWriter(folder)
    try:
        write_rows([source], recipe, {TRAIN: writer})
        require_supervision(writer.summary, source)
        writer.finish(identity_of(recipe.encoder))
    finally:
        writer.close()
