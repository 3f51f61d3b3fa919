"""From records to token ids and loss masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from specforge.data.chat import read_chat
from specforge.data.origin import Origin, read_origin
from specforge.data.sources import Record
from specforge.data.template import ChatRenderer, Span, SupervisedText
from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_Tokens = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One tokenised row.

    Attributes:
        input_ids: int32 [T].
        loss_mask: bool [T], True where the verifier would have to produce the token.
        origin: Who wrote the responses; None where the row does not say.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    origin: Origin | None = None


def holds_tokens(record: Record) -> bool:
    """Tell whether a record is tokenised already."""
    return record.value.get("input_ids") is not None and record.value.get("loss_mask") is not None


class RowEncoder:
    """Turns records into token rows.

    Args:
        tokenizer: the verifier's tokenizer; None for a source whose rows hold tokens already.
        vocabulary_size: number of ids of the verifier; a row with another id is refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> None:
        self.vocabulary_size = vocabulary_size
        self._renderer = None if tokenizer is None else ChatRenderer(tokenizer)
        self._tokenizer_state = None if tokenizer is None else _tokenizer_state(tokenizer)
        self._tokenizer = None if self._tokenizer_state is None else Tokenizer.from_str(self._tokenizer_state)
        self._templates = None if tokenizer is None else [tokenizer.chat_template, tokenizer.special_tokens_map]

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer, so that rows may be texts."""
        return self._tokenizer is not None

    @property
    def identity(self) -> str:
        """All that the rows depend on besides the source: the tokenizer, its template and the vocabulary's size."""
        return json.dumps([self._tokenizer_state, self._templates, self.vocabulary_size], sort_keys=True, default=str)

    def encode(self, records: Sequence[Record]) -> list[TokenRow]:
        """Tokenise records, the texts among them in one call.

        Raises:
            UsageError: a record is refused; the message names its location.
        """
        texts = {number: self._read(record) for number, record in enumerate(records) if not holds_tokens(record)}
        encoded = dict(zip(texts, self._tokenise(list(texts.values())), strict=True))
        pairs = [encoded[n] if n in encoded else _stored_tokens(record) for n, record in enumerate(records)]
        return [self._row(*pair, record) for pair, record in zip(pairs, records, strict=True)]

    def _read(self, record: Record) -> SupervisedText:
        if self._renderer is None:
            raise UsageError(
                f"{record.location}: a row of text in a source whose first row holds 'input_ids' and 'loss_mask'; "
                "keep the two kinds in separate sources"
            )
        text = _supervised_text(record, self._renderer)
        try:
            text.text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{record.location}: the text holds half a character: {error.reason}") from error
        return text

    def _tokenise(self, texts: list[SupervisedText]) -> list[_Tokens]:
        rows: dict[int, _Tokens] = {}
        for add_special_tokens in (False, True):
            chosen = [n for n, text in enumerate(texts) if text.add_special_tokens == add_special_tokens]
            if chosen and self._tokenizer is not None:
                encodings = self._tokenizer.encode_batch(
                    [texts[n].text for n in chosen], add_special_tokens=add_special_tokens
                )
                rows.update((n, _masked_tokens(e, texts[n].spans)) for n, e in zip(chosen, encodings, strict=True))
        return [rows[number] for number in range(len(texts))]

    def _row(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_], record: Record) -> TokenRow:
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocabulary_size))
        if outside.size:
            raise UsageError(
                f"{record.location}: id {ids[outside[0]]} at position {outside[0]} is outside the verifier's "
                f"vocabulary of {self.vocabulary_size} ids; was the row written with another tokenizer?"
            )
        return TokenRow(ids.astype(np.int32), mask, read_origin(record))


def tokens_inside(offsets: npt.NDArray[np.int64], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Mark the tokens that lie whole inside a span.

    Args:
        offsets: int64 [T, 2], the half-open character range of each token.
        spans: half-open character ranges, ascending and disjoint.

    Returns:
        bool [T]; False for a token that straddles a boundary or covers no character.
    """
    if not spans:
        return np.zeros(len(offsets), dtype=np.bool_)
    starts, ends = np.asarray(spans, dtype=np.int64).T
    span = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    inside: npt.NDArray[np.bool_] = (span >= 0) & (offsets[:, 1] <= ends[span]) & (offsets[:, 0] < offsets[:, 1])
    return inside


def _supervised_text(record: Record, renderer: ChatRenderer) -> SupervisedText:
    chat = read_chat(record)
    if isinstance(chat, str):
        return SupervisedText(chat, [(0, len(chat))], add_special_tokens=True)
    if chat.texts and not renderer.has_template:
        prompt, reply = chat.texts
        return SupervisedText(prompt + reply, [(len(prompt), len(prompt + reply))], add_special_tokens=True)
    return renderer.render(chat.messages, chat.tools, record.location)


def _masked_tokens(encoding: Any, spans: Sequence[Span]) -> _Tokens:
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return np.asarray(encoding.ids, dtype=np.int64), tokens_inside(offsets, spans)


def _stored_tokens(record: Record) -> _Tokens:
    ids = _flat_integers(record, "input_ids", "i")
    mask = _flat_integers(record, "loss_mask", "ib")
    if len(ids) != len(mask):
        raise UsageError(f"{record.location}: 'input_ids' has {len(ids)} entries, 'loss_mask' {len(mask)}")
    if not np.isin(mask, (0, 1)).all():
        raise UsageError(f"{record.location}: 'loss_mask' holds values other than 0 and 1")
    return ids, mask.astype(np.bool_)


def _flat_integers(record: Record, key: str, kinds: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(record.value[key])
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in kinds:
        raise UsageError(f"{record.location}: {key!r} must be a list of integers that is not empty")
    return array


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Serialise the tokenizer, with offsets that cover every character and without its own truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            "the verifier's tokenizer has no tokenizer.json form; give rows with 'input_ids' and 'loss_mask'"
        )
    state = json.loads(backend.to_str())
    # Truncation and padding are left behind by whoever called the tokenizer last, and would change the rows.
    state.update(truncation=None, padding=None)
    # Trimmed offsets leave out blanks: a token of blanks would seem to lie nowhere, and drop out of the mask.
    post_processor = state.get("post_processor") or {}
    for part in (post_processor, *post_processor.get("processors", ())):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
    return json.dumps(state)
