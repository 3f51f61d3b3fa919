"""Token rows on disk: built once from a source, cached by content, read through a memory map."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from specforge.data.cache import ensure_folder
from specforge.data.encoding import RowEncoder, TokenRow, holds_tokens
from specforge.data.origin import Origin
from specforge.data.sources import read_records, source_fingerprint
from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2  # raised when the same source would give other rows, so that old caches are left alone
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))])
_CHUNK = 256  # rows tokenised and written at once
_ROWS_FILE = "rows.arrow"
_SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class RowSettings:
    """What is done with long rows.

    Attributes:
        max_length: longest row, in tokens.
        long_rows: `truncate` cuts longer rows at the end, `drop` leaves them out.
    """

    max_length: int
    long_rows: Literal["truncate", "drop"]


@dataclass
class RowsSummary:
    """What became of a source.

    Attributes:
        rows: rows kept.
        tokens: tokens in them.
        supervised_tokens: tokens in them whose loss mask is set.
        truncated: rows of the source that were cut.
        dropped: rows of the source that were left out, by reason.
        origins: who wrote the responses of the rows kept, each once; None stands for rows that do not say.
    """

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    origins: list[Origin | None] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read a summary back."""
        return cls(**{**values, "origins": [one and Origin.model_validate(one) for one in values["origins"]]})

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {**asdict(self), "origins": [one and one.model_dump() for one in self.origins]}


class TokenRows:
    """Tokenised rows, read from disk as they are needed.

    Args:
        table: columns `input_ids` (lists of int32) and `loss_mask` (lists of bool).
        summary: what became of the source.
        vocabulary_size: number of ids of the verifier, V.
    """

    def __init__(self, table: Dataset, summary: RowsSummary, vocabulary_size: int) -> None:
        self.summary = summary
        self.vocabulary_size = vocabulary_size
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids` int64 [T] and `loss_mask` bool [T] of one row."""
        row = self._table[index]
        ids = row["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        mask = row["loss_mask"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return {"input_ids": torch.from_numpy(ids.astype(np.int64)), "loss_mask": torch.from_numpy(mask)}

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, int64 [rows]."""
        parts = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in self._batches()]
        return np.concatenate(parts).astype(np.int64)

    @cached_property
    def supervised_counts(self) -> Tensor:
        """How often each id is supervised, int64 [V]."""
        counts = np.zeros(self.vocabulary_size, dtype=np.int64)
        for batch in self._batches():
            supervised = pc.list_flatten(batch["input_ids"]).filter(pc.list_flatten(batch["loss_mask"]))
            counts += np.bincount(supervised.to_numpy(), minlength=self.vocabulary_size)
        return torch.from_numpy(counts)

    def select(self, indices: npt.NDArray[np.int64]) -> TokenRows:
        """Return some of the rows; `truncated` and `dropped` of the summary still tell of the whole source."""
        chosen = TokenRows(self._table.select(indices), self.summary, self.vocabulary_size)
        tokens, supervised_tokens = int(chosen.lengths.sum()), int(chosen.supervised_counts.sum())
        chosen.summary = replace(self.summary, rows=len(chosen), tokens=tokens, supervised_tokens=supervised_tokens)
        return chosen

    def _batches(self) -> Iterator[pa.Table]:
        return iter(self._table.iter(batch_size=1024))


def build_rows(
    source: str,
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
    vocabulary_size: int,
    settings: RowSettings,
    cache_dir: Path,
) -> TokenRows:
    """Return the token rows of a source, from the cache where it holds them.

    Args:
        source: path or hub name, see `specforge.data.sources`.
        load_tokenizer: returns the verifier's tokenizer; called only when the source's first row is text.
        vocabulary_size: number of ids of the verifier.
        settings: what is done with long rows.
        cache_dir: folder of the caches; the rows lie in a folder named by all that they depend on.

    Raises:
        UsageError: a row is refused (the message names file and line), or no supervised token is left.
        SpecforgeError: the cache cannot be written.
    """
    first = next(read_records(source), None)
    if first is None:
        raise UsageError(f"{source}: holds no rows")
    encoder = RowEncoder(None if holds_tokens(first) else load_tokenizer(), vocabulary_size)
    identity = json.dumps([FORMAT, source_fingerprint(source), asdict(settings), encoder.identity])
    folder = cache_dir / hashlib.sha256(identity.encode()).hexdigest()
    ensure_folder(folder, lambda target: _write_rows(target, source, encoder, settings), _is_whole)
    rows = _open_rows(folder, vocabulary_size)
    # The first token of a row has nothing before it: a mask of all ones may leave it out.
    if rows.summary.supervised_tokens >= rows.summary.tokens - rows.summary.rows:
        warnings.warn(f"{source}: every token is supervised; is that meant, or is the loss mask missing?", stacklevel=2)
    return rows


def _open_rows(folder: Path, vocabulary_size: int) -> TokenRows:
    stored = json.loads((folder / _SUMMARY_FILE).read_text())
    return TokenRows(
        Dataset.from_file(str(folder / _ROWS_FILE)), RowsSummary.from_json(stored["summary"]), vocabulary_size
    )


def _is_whole(folder: Path) -> bool:
    try:
        stored = json.loads((folder / _SUMMARY_FILE).read_text())
        rows = Dataset.from_file(str(folder / _ROWS_FILE))
        return bool(len(rows) == stored["summary"]["rows"] and (folder / _ROWS_FILE).stat().st_size == stored["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_rows(folder: Path, source: str, encoder: RowEncoder, settings: RowSettings) -> None:
    """Stream the source into an Arrow file, then write the summary that vouches for it."""
    summary = RowsSummary()
    dropped: Counter[str] = Counter()
    with pa.OSFile(str(folder / _ROWS_FILE), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for chunk in _encoded_chunks(source, encoder):
            kept = [fitted for row in chunk if (fitted := _fit(row, settings, summary, dropped)) is not None]
            writer.write_batch(_record_batch(kept))
            summary.rows += len(kept)
            summary.origins = list(dict.fromkeys([*summary.origins, *(row.origin for row in kept)]))
            summary.tokens += sum(len(row.input_ids) for row in kept)
            summary.supervised_tokens += sum(int(row.loss_mask.sum()) for row in kept)
    summary.dropped = dict(dropped)
    if not summary.supervised_tokens:
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in summary.dropped.items())
        raise UsageError(f"{source}: no supervised token in the whole set; rows dropped: {reasons or 'none'}")
    stored: dict[str, Any] = {"bytes": (folder / _ROWS_FILE).stat().st_size, "summary": summary.to_json()}
    (folder / _SUMMARY_FILE).write_text(json.dumps(stored))


def _encoded_chunks(source: str, encoder: RowEncoder) -> Iterator[list[TokenRow]]:
    # disable=None shows the bar on a terminal only; delay hides it for short builds.
    records = iter(tqdm(read_records(source), desc=f"tokenising {source}", unit=" rows", disable=None, delay=2))
    while chunk := list(islice(records, _CHUNK)):
        yield encoder.encode(chunk)


def _fit(row: TokenRow, settings: RowSettings, summary: RowsSummary, dropped: Counter[str]) -> TokenRow | None:
    """Return the row as it is kept, or count why it is not."""
    limit = settings.max_length
    if not row.loss_mask.any():
        dropped["no supervised token"] += 1
        return None
    if len(row.input_ids) <= limit:
        return row
    if settings.long_rows == "drop":
        dropped["longer than max_length"] += 1
        return None
    if not row.loss_mask[:limit].any():
        dropped["no supervised token within max_length"] += 1
        return None
    summary.truncated += 1
    return replace(row, input_ids=row.input_ids[:limit], loss_mask=row.loss_mask[:limit])


def _record_batch(rows: list[TokenRow]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int32)
    ids = np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)])
    mask = np.concatenate([np.empty(0, np.bool_), *(row.loss_mask for row in rows)])
    columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, mask)]
    return pa.record_batch(columns, schema=_SCHEMA)
