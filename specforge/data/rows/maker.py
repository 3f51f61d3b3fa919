"""Raw rows to record batches: parsing, tokenising, splitting, truncating. Worker processes run this part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from specforge.data.rows.summary import BadRows, RowSettings, RowsSummary
from specforge.data.text.bad_rows import BadRow
from specforge.data.text.encoding import RowEncoder, TokenRow
from specforge.data.text.records import RawRecord, Record
from specforge.data.text.replies import CORRECTED

FORMAT = 3  # raised when the same source would give other rows, so that old caches are not used
SCHEMA = pa.schema(
    # `chat` is equal for the rows of one chat, which must stay in one split.
    [("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_())), ("chat", pa.int64())]
)
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class WrittenRows:
    """The token rows that a chunk of raw rows adds to a split.

    Attributes:
        message: A serialized Arrow record batch.
        summary: Summary of the chunk's rows in this split.
    """

    message: bytes
    summary: RowsSummary


@dataclass(frozen=True)
class RowMaker:
    """Makes token rows of raw rows; equal makers make equal rows of equal sources.

    Attributes:
        encoder: Tokenises the rows.
        settings: How to treat long and bad rows.
        validation_share: Share of the rows that goes to the validation split, from 0 to below 1.
        seed: Selects which rows these are.
    """

    encoder: RowEncoder
    settings: RowSettings
    validation_share: float = 0.0
    seed: int = 0

    @property
    def identity(self) -> str:
        """Everything that the rows depend on except the sources."""
        split = [self.validation_share, self.seed] if self.validation_share else None
        length = [self.settings.max_length, self.settings.long_rows]
        return json.dumps([FORMAT, length, split, self.encoder.identity])

    def with_date(self, date: str) -> RowMaker:
        """Return the same maker with another date, for templates that print one."""
        return replace(self, encoder=self.encoder.with_date(date))

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return (TRAIN, VALIDATION) if self.validation_share else (TRAIN,)

    def split_of(self, rows: Sequence[TokenRow]) -> str:
        """Return the split of the rows of a record.

        The split depends only on the tokens of the first row and on the seed. Equal rows and the rows of one chat
        therefore share a split, and a row keeps its split when other rows are added or removed.
        """
        return VALIDATION if _digest(rows[0], f"{self.seed} ") < self.validation_share * 2**64 else TRAIN

    def fit(self, row: TokenRow) -> TokenRow | str:
        """Return the row as it will be stored, or the reason for dropping it."""
        limit = self.settings.max_length
        if not row.loss_mask.any():
            return "no supervised token"
        if len(row.input_ids) <= limit:
            return row
        if self.settings.long_rows == "drop":
            return "longer than max_length"
        if not row.loss_mask[:limit].any():
            return "no supervised token within max_length"
        return replace(row, input_ids=row.input_ids[:limit], loss_mask=row.loss_mask[:limit])

    def make(self, chunk: Sequence[RawRecord]) -> dict[str, WrittenRows]:
        """Return what a chunk of raw rows adds to each split; counts of the whole chunk go to the training split.

        Raises:
            UsageError: A row is bad and ``bad_rows`` is ``refuse``; the message names its location.
        """
        splits = {split: _Split(RowsSummary()) for split in self.splits}
        parsed = [_parse(raw) for raw in chunk]
        encoded = iter(
            self.encoder.encode([one for one in parsed if isinstance(one, Record)], self.settings.max_length)
        )
        for record in parsed:
            rows = next(encoded) if isinstance(record, Record) else record
            if isinstance(rows, BadRow):
                if self.settings.bad_rows == "refuse":
                    raise rows
                splits[TRAIN].summary += RowsSummary(bad={rows.reason: BadRows(1, str(rows))})
            else:
                splits[self.split_of(rows)].add(rows, self)
        splits[TRAIN].summary.source_rows = len(chunk)
        return {split: one.batch(self.encoder.end_ids) for split, one in splits.items()}


@dataclass
class _Split:
    """Collects the rows of one split for a batch."""

    summary: RowsSummary
    rows: list[TokenRow] = field(default_factory=list)
    chats: list[int] = field(default_factory=list)

    def add(self, rows: Sequence[TokenRow], maker: RowMaker) -> None:
        """Add the rows of one record."""
        kept = []
        for row in rows:
            fitted = maker.fit(row)
            if isinstance(fitted, str):
                self.summary.dropped[fitted] = self.summary.dropped.get(fitted, 0) + 1
                continue
            kept.append(fitted)
            self.summary.truncated += fitted is not row
            self.summary.corrected_replies += row.rules.count(CORRECTED)
        if len(rows) > 1:
            self.summary.split_chats += 1
            self.summary.repeated_tokens += sum(len(row.input_ids) for row in kept[:-1])
        self.rows += kept
        self.chats += [_digest(rows[0]) - 2**63] * len(kept)

    def batch(self, end_ids: npt.NDArray[np.int32]) -> WrittenRows:
        """Return the batch with its summary."""
        summary, rows = self.summary, self.rows
        offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int32)
        ids = np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)])
        mask = np.concatenate([np.empty(0, np.bool_), *(row.loss_mask for row in rows)])
        begins = mask & ~np.concatenate([[False], mask[:-1]])
        begins[offsets[:-1]] = mask[offsets[:-1]]
        ends = mask & ~np.concatenate([mask[1:], [False]])
        ends[offsets[1:] - 1] = mask[offsets[1:] - 1]
        summary.rows, summary.tokens, summary.supervised_tokens = len(rows), len(ids), int(mask.sum())
        if end_ids.size:
            summary.replies = int(begins.sum())
            summary.ended_replies = int((ends & np.isin(ids, end_ids)).sum())
        summary.origins = list(dict.fromkeys(row.origin for row in rows))
        columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, mask)]
        columns.append(pa.array(self.chats, pa.int64()))
        return WrittenRows(pa.record_batch(columns, schema=SCHEMA).serialize().to_pybytes(), summary)


def _parse(raw: RawRecord) -> Record | BadRow:
    try:
        return raw.parse()
    except BadRow as error:
        return error


def _digest(row: TokenRow, salt: str = "") -> int:
    """Return a 64-bit digest of a row's tokens."""
    return int.from_bytes(hashlib.blake2b(salt.encode() + row.input_ids.tobytes(), digest_size=8).digest())
