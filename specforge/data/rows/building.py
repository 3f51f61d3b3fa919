"""Token rows of a source: prepared rows are used as they are, others are built once and cached by content."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge.data.rows.cache import ensure_folder
from specforge.data.rows.maker import FORMAT, TRAIN, RowMaker
from specforge.data.rows.reading import TokenRows, is_whole, open_rows, token_rows
from specforge.data.rows.stored import ROWS_FILE, StoredRows
from specforge.data.rows.summary import RowSettings, RowsSummary
from specforge.data.rows.writing import RowsWriter, write_rows
from specforge.data.text.bad_rows import BadRow
from specforge.data.text.encoding import RowEncoder, holds_tokens, is_foreign
from specforge.data.text.records import Record
from specforge.data.text.sources import read_raw_records, source_fingerprint
from specforge.data.text.template import arguments_advice
from specforge.errors import UsageError

if TYPE_CHECKING:
    from specforge.data.text.template import ChatTemplate


def build_rows(
    source: str,
    load_template: Callable[[], ChatTemplate],
    vocabulary_size: int,
    settings: RowSettings,
    cache_dir: Path,
) -> TokenRows:
    """Return the token rows of a source: a folder of token rows is opened, any other source goes through the cache.

    Args:
        source: Path or hub name, see ``specforge.data.text.sources``.
        load_template: Returns the verifier's chat template; not called if the source holds token ids.
        vocabulary_size: Vocabulary size V of the verifier.
        settings: How to treat long and bad rows.
        cache_dir: Folder of the caches; each cache is a subfolder named by a hash of everything the rows depend on.

    Raises:
        UsageError: Too many rows are bad (the message names the first by file and line), no supervised token is left,
            or a folder of rows is damaged, was made for another verifier or holds rows that are too long.
        SpecforgeError: The cache cannot be written.
    """
    if (Path(source) / ROWS_FILE).is_file():
        rows = _prepared_rows(Path(source), load_template, vocabulary_size, settings.max_length)
    else:
        maker = RowMaker(make_encoder([source], load_template, vocabulary_size), settings)
        folder = _cache_folder(source, maker, cache_dir)
        ensure_folder(folder, lambda target: _write_rows(target, source, maker), is_whole)
        rows = open_rows(folder, vocabulary_size)
        rows.summary.require_few_bad(settings, source)
    # The first token of a row has no context, so an all-ones mask may exclude it.
    if rows.summary.supervised_tokens >= rows.summary.tokens - rows.summary.rows:
        warnings.warn(
            f"{source}: every token is supervised; is this intended, or is the loss mask missing?", stacklevel=2
        )
    return rows


def is_built(
    source: str,
    load_template: Callable[[], ChatTemplate],
    vocabulary_size: int,
    settings: RowSettings,
    cache_dir: Path,
) -> bool:
    """Return whether ``build_rows`` with the same arguments would find the rows already built."""
    if (Path(source) / ROWS_FILE).is_file():
        return True
    maker = RowMaker(make_encoder([source], load_template, vocabulary_size), settings)
    return is_whole(_cache_folder(source, maker, cache_dir))


def make_encoder(sources: Sequence[str], load_template: Callable[[], ChatTemplate], vocabulary_size: int) -> RowEncoder:
    """Return the encoder of some sources; it has no tokenizer if the first row of every source holds token ids.

    Args:
        sources: Paths or hub names.
        load_template: Returns the verifier's chat template.
        vocabulary_size: Vocabulary size V of the verifier.

    Raises:
        UsageError: A source holds no rows that can be parsed, or token ids of another tokenizer.
    """
    first = [_first_record(source) for source in sources]
    for record in filter(holds_tokens, first):
        _require_own_ids(record, load_template, vocabulary_size)
    holds_texts = not all(map(holds_tokens, first))
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


def _require_own_ids(record: Record, load_template: Callable[[], ChatTemplate], vocabulary_size: int) -> None:
    """Refuse token ids that do not hold the text of the row's messages, if it has any."""
    messages, tokens = record.value.get("messages"), record.value["input_ids"]
    if not isinstance(messages, list) or not isinstance(tokens, list):
        return
    asked = (one.get("content") for one in messages if isinstance(one, dict) and one.get("role") == "user")
    text = next((content for content in asked if isinstance(content, str)), None)
    if text is None or not all(type(one) is int and 0 <= one < vocabulary_size for one in tokens):
        return  # which are refused later
    try:
        tokenizer = load_template().tokenizer
    except UsageError:
        return  # token ids need no tokenizer
    if is_foreign(tokens, text, tokenizer):
        raise UsageError(
            f"{record.location}: 'input_ids' do not hold the text of 'messages': they are of another verifier's "
            "tokenizer; give rows with this verifier's responses (specforge prepare responses), or drop 'input_ids' "
            "and 'loss_mask', and the messages are tokenised"
        )


def identity_of(encoder: RowEncoder) -> dict[str, Any]:
    """Return the metadata stored with rows: their format and what they require of a verifier."""
    template = encoder.template
    return {
        "format": FORMAT,
        "vocabulary_size": encoder.vocabulary_size,
        "tokenizer": encoder.tokenizer_digest,
        "template_arguments": template and template.arguments,
        "template_date": template.date if template and template.prints_date else None,
    }


def require_supervision(summary: RowsSummary, source: str) -> None:
    """Refuse rows without supervised tokens.

    Raises:
        UsageError: No token is supervised.
    """
    if not summary.supervised_tokens:
        reasons = ", ".join(f"{count:,} ({reason})" for reason, count in summary.dropped.items())
        raise UsageError(f"{source}: no token is supervised; rows dropped: {reasons or 'none'}")


def _cache_folder(source: str, maker: RowMaker, cache_dir: Path) -> Path:
    identity = json.dumps([source_fingerprint(source), maker.identity])
    return cache_dir / hashlib.sha256(identity.encode()).hexdigest()


def _prepared_rows(
    folder: Path, load_template: Callable[[], ChatTemplate], vocabulary_size: int, max_length: int
) -> TokenRows:
    """Open a folder of rows and check that it suits the run."""
    opened = StoredRows(folder)
    stored = opened.description
    if stored.get("format") != FORMAT:
        raise UsageError(f"{folder}: the rows were prepared by another version of specforge; prepare them again")
    if stored.get("vocabulary_size") != vocabulary_size:
        raise UsageError(
            f"{folder}: the rows are for a vocabulary of {stored.get('vocabulary_size')} ids, this verifier has "
            f"{vocabulary_size}; prepare them for this verifier"
        )
    if stored.get("tokenizer"):
        template = load_template()
        if stored["tokenizer"] != RowEncoder(template, vocabulary_size).tokenizer_digest:
            raise UsageError(
                f"{folder}: the rows were prepared with a tokenizer or chat template other than this verifier's; "
                "prepare them for this verifier"
            )
        arguments = stored.get("template_arguments") or {}
        if arguments != template.arguments:
            raise UsageError(
                f"{folder}: the rows were prepared with template arguments {arguments}, this run has "
                f"{template.arguments}; {arguments_advice(arguments).replace('--', '--data.')}"
            )
    rows = token_rows(opened, vocabulary_size)
    longest = int(rows.lengths.max())
    if longest > max_length:
        raise UsageError(
            f"{folder}: the longest row has {longest} tokens, max_length is {max_length}; raise it to {longest}, or "
            "prepare the rows with a shorter --max_length"
        )
    return rows


def _write_rows(folder: Path, source: str, maker: RowMaker) -> None:
    """Write a cache folder."""
    writer = RowsWriter(folder)
    try:
        write_rows([source], maker, {TRAIN: writer})
        require_supervision(writer.summary, source)
        writer.finish(identity_of(maker.encoder))
    finally:
        writer.close()
