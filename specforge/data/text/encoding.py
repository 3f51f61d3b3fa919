"""Encoding of records as token ids and loss masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.chat import Chat, read_chat
from specforge.data.text.origin import Origin, read_origin, template_arguments_of
from specforge.data.text.records import Record
from specforge.data.text.replies import ReplyFinder, SupervisedText
from specforge.data.text.template import ChatTemplate, Span, TooSlow, arguments_advice
from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_SLOW = 3  # rows that take too long to render before the template is blamed
_CHARACTERS = 6  # characters first rendered per token of max_length
_Tokens = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One tokenised row.

    Attributes:
        input_ids: Token ids, int32 [T].
        loss_mask: Which tokens the verifier would have to produce, bool [T].
        origin: Who wrote the responses; None if the row does not state it.
        rules: How the span of each reply was found; empty for token rows.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    origin: Origin | None = None
    rules: tuple[str, ...] = ()


def holds_tokens(record: Record) -> bool:
    """Return whether a record is already tokenised."""
    return record.value.get("input_ids") is not None and record.value.get("loss_mask") is not None


def is_foreign(tokens: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether token ids that should hold a text decode to another one, since they are of another tokenizer.

    Tokenizers may change spaces and single characters: more than half of the runs of three characters, of the text's
    first 500, have to be missing.
    """
    decoded = "".join(str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)).split())
    letters = "".join(text.split())[:500]
    runs = {letters[start : start + 3] for start in range(max(1, len(letters) - 2))}
    return sum(run in decoded for run in runs) < len(runs) / 2


class RowEncoder:
    """Encodes records as token rows.

    Args:
        template: Chat template of the verifier, with its tokenizer; None for a source of token rows.
        vocabulary_size: Vocabulary size V of the verifier; a row with an id outside is refused.
    """

    def __init__(self, template: ChatTemplate | None, vocabulary_size: int) -> None:
        self.template = template
        self.vocabulary_size = vocabulary_size
        self._finder = None if template is None else ReplyFinder(template)
        self._tokenizer_state = None if template is None else _tokenizer_state(template.tokenizer)
        self._tokenizer = None if self._tokenizer_state is None else Tokenizer.from_str(self._tokenizer_state)
        ends = [] if template is None else template.tokenizer.convert_tokens_to_ids(list(template.end_tokens))
        self.end_ids = np.array(ends, dtype=np.int32)
        """Ids of the verifier's end tokens, int32 [E]."""
        self._slow = 0

    @property
    def identity(self) -> str:
        """Everything that the rows depend on except the source: tokenizer, chat template and vocabulary size."""
        template = None if self.template is None else self.template.identity
        return json.dumps([self._tokenizer_state, template, self.vocabulary_size], sort_keys=True, default=str)

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of the tokenizer and its chat template, without template arguments; None without a template."""
        if self.template is None:
            return None
        names = [self.template.tokenizer.chat_template, self.template.tokenizer.special_tokens_map]
        stored = json.dumps([self._tokenizer_state, names, self.vocabulary_size], sort_keys=True, default=str)
        return hashlib.sha256(stored.encode()).hexdigest()

    def with_date(self, date: str) -> RowEncoder:
        """Return the same encoder with another date, for templates that print one."""
        return self if self.template is None else RowEncoder(self.template.with_date(date), self.vocabulary_size)

    def encode(self, records: Sequence[Record], max_length: int | None = None) -> list[list[TokenRow] | BadRow]:
        """Tokenise records, with one tokenizer call for all texts.

        Args:
            records: The records.
            max_length: Number of tokens kept per row; longer chats need not be rendered to their end.

        Returns:
            For each record its rows, or the error if it is bad. A chat is one row, or one row per turn if the chat
            template rewrites earlier turns.

        Raises:
            UsageError: The responses were written with other template arguments, or the template takes too long.
        """
        made: list[list[TokenRow] | BadRow] = []
        texts: list[SupervisedText] = []
        pending: list[tuple[int, Record, int, bool]] = []
        for record in records:
            try:
                if holds_tokens(record):
                    made.append([self._row(*_stored_tokens(record), record)])
                    continue
                read, is_whole = self._read(record, max_length and max_length * _CHARACTERS)
                pending.append((len(made), record, len(read), is_whole))
                texts += read
                made.append([])
            except BadRow as error:
                self._count_slow(error)
                made.append(error)
        tokens = iter(self._tokenise(texts))
        chosen = iter(texts)
        for number, record, count, is_whole in pending:
            rows = [(next(chosen), next(tokens)) for _ in range(count)]
            try:
                if not is_whole and len(rows[-1][1][0]) <= (max_length or 0):
                    rows = self._whole(record)
                made[number] = [self._row(*pair, record, text.rules) for text, pair in rows]
            except BadRow as error:
                self._count_slow(error)
                made[number] = error
        return made

    def _whole(self, record: Record) -> list[tuple[SupervisedText, _Tokens]]:
        """Render and tokenise a record to its end."""
        texts, _ = self._read(record, None)
        return list(zip(texts, self._tokenise(texts), strict=True))

    def _read(self, record: Record, characters: int | None) -> tuple[list[SupervisedText], bool]:
        """Return the texts of a record, and whether they cover all of it."""
        if self._finder is None:
            raise UsageError(
                f"{record.location}: a text row in a source whose first row holds 'input_ids' and 'loss_mask'; "
                "keep the two kinds in separate sources"
            )
        chat = read_chat(record)
        if isinstance(chat, Chat) and (self._finder.template.exists or chat.texts is None):
            self._require_same_arguments(record, self._finder.template)
            replies = self._finder.find(chat, record.location, characters)
            texts, is_whole = replies.texts, replies.is_whole
        else:
            prompt, text = ("", chat) if isinstance(chat, str) else chat.texts or ("", "")
            span = (len(prompt), len(prompt) + len(text))
            texts, is_whole = [SupervisedText(prompt + text, (span,), ("text",), add_special_tokens=True)], True
        for one in texts:
            try:
                one.text.encode()
            except UnicodeEncodeError as error:
                raise BadRow(
                    record.location, "unpaired surrogate", f"the text holds an unpaired surrogate: {error.reason}"
                ) from error
        return texts, is_whole

    def _require_same_arguments(self, record: Record, template: ChatTemplate) -> None:
        written = template_arguments_of(record)
        if written is not None and written != template.arguments:
            raise UsageError(
                f"{record.location}: origin: the response was written with template arguments {written}, but rows "
                f"are rendered with {template.arguments}; {arguments_advice(written)}"
            )

    def _count_slow(self, error: BadRow) -> None:
        if isinstance(error.__cause__, TooSlow):
            self._slow += 1
            if self._slow == _MOST_SLOW:
                raise UsageError(
                    f"{error}; it is the third such row: the verifier's chat template seems not to terminate. Fix it, "
                    "or give rows with 'input_ids' and 'loss_mask'"
                )

    def _tokenise(self, texts: Sequence[SupervisedText]) -> list[_Tokens]:
        rows: dict[int, _Tokens] = {}
        for add_special_tokens in (False, True):
            chosen = [n for n, text in enumerate(texts) if text.add_special_tokens == add_special_tokens]
            if chosen and self._tokenizer is not None:
                encodings = self._tokenizer.encode_batch(
                    [texts[n].text for n in chosen], add_special_tokens=add_special_tokens
                )
                rows.update((n, self._masked(e, texts[n])) for n, e in zip(chosen, encodings, strict=True))
        return [rows[number] for number in range(len(texts))]

    def _masked(self, encoding: Any, text: SupervisedText) -> _Tokens:
        """Return a text's tokens and which of them are supervised.

        In serving, the prompt is tokenised and the verifier generates the reply's tokens, so no token straddles the
        boundary between them. If one does here, the text is tokenised in pieces that are split at the boundary.
        """
        ids, offsets = _arrays(encoding)
        cuts = _straddled(offsets, text.spans)
        if cuts and self._tokenizer is not None:
            bounds = [0, *cuts, len(text.text)]
            pieces = [self._tokenizer.encode(text.text[a:b], add_special_tokens=False) for a, b in pairwise(bounds)]
            parts = [
                (ids, offsets + begin) for (ids, offsets), begin in zip(map(_arrays, pieces), bounds, strict=False)
            ]
            joined = np.concatenate([part for part, _ in parts])
            # Tokenizers that prepend a space to each text would add some here.
            if self._tokenizer.decode(joined.tolist(), False) == self._tokenizer.decode(ids.tolist(), False):
                ids, offsets = joined, np.concatenate([part for _, part in parts])
        return ids, tokens_inside(offsets, text.spans)

    def _row(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_], record: Record, rules: tuple[str, ...] = ()
    ) -> TokenRow:
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocabulary_size))
        if outside.size:
            raise BadRow(
                record.location,
                "id outside the vocabulary",
                f"id {ids[outside[0]]} at position {outside[0]} is outside the verifier's vocabulary of "
                f"{self.vocabulary_size} ids; was the row tokenised with another tokenizer?",
            )
        return TokenRow(ids.astype(np.int32), mask, read_origin(record), rules)


def tokens_inside(offsets: npt.NDArray[np.int64], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Mark the tokens that are entirely inside a span.

    Args:
        offsets: Half-open character range of each token, int64 [T, 2].
        spans: Half-open character ranges, ascending and disjoint.

    Returns:
        Bool [T]; False for a token that straddles a boundary or covers no character.
    """
    if not spans:
        return np.zeros(len(offsets), dtype=np.bool_)
    starts, ends = np.asarray(spans, dtype=np.int64).T
    span = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    inside: npt.NDArray[np.bool_] = (span >= 0) & (offsets[:, 1] <= ends[span]) & (offsets[:, 0] < offsets[:, 1])
    return inside


def _arrays(encoding: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return ids int64 [T] and offsets int64 [T, 2]."""
    return np.asarray(encoding.ids, dtype=np.int64), np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _straddled(offsets: npt.NDArray[np.int64], spans: Sequence[Span]) -> list[int]:
    """Return the span boundaries that are inside a token, ascending."""
    if not len(offsets):  # a tokenizer that drops the whole text
        return []
    bounds = np.unique(np.asarray(spans, dtype=np.int64))
    before = np.searchsorted(offsets[:, 0], bounds, side="left") - 1  # the last token that starts before
    is_inside = (before >= 0) & (offsets[before, 1] > bounds)
    return [int(bound) for bound in bounds[is_inside]]


def _stored_tokens(record: Record) -> _Tokens:
    ids = _flat_integers(record, "input_ids", "i")
    mask = _flat_integers(record, "loss_mask", "ib")
    if len(ids) != len(mask):
        raise BadRow(
            record.location, "malformed tokens", f"'input_ids' has {len(ids)} entries, 'loss_mask' {len(mask)}"
        )
    if not np.isin(mask, (0, 1)).all():
        raise BadRow(record.location, "malformed tokens", "'loss_mask' holds values other than 0 and 1")
    return ids, mask.astype(np.bool_)


def _flat_integers(record: Record, key: str, kinds: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(record.value[key])
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in kinds:
        raise BadRow(record.location, "malformed tokens", f"{key!r} must be a non-empty list of integers")
    return array


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Serialise the tokenizer with offsets that cover every character and without truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError("the verifier's tokenizer has no tokenizer.json; give rows with 'input_ids' and 'loss_mask'")
    state = json.loads(backend.to_str())
    # Truncation and padding are state left by the last caller, and would change the rows.
    state.update(truncation=None, padding=None)
    # Trimmed offsets leave out spaces: a token of spaces would cover nothing and drop out of the mask.
    post_processor = state.get("post_processor") or {}
    for part in (post_processor, *post_processor.get("processors", ())):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
    return json.dumps(state)
