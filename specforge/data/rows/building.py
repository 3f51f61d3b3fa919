"""Token rows of a source: prepared ones as they lie there, others built once and cached by content."""

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
from specforge.data.text.encoding import RowEncoder, holds_tokens
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
        maker = RowMaker(make_encoder([source], load_template, vocabulary_size), settings)
        folder = _cache_folder(source, maker, cache_dir)
        ensure_folder(folder, lambda target: _write_rows(target, source, maker), is_whole)
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
    maker = RowMaker(make_encoder([source], load_template, vocabulary_size), settings)
    return is_whole(_cache_folder(source, maker, cache_dir))


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


def require_supervision(summary: RowsSummary, source: str) -> None:
    """Refuse rows that teach nothing.

    Raises:
        UsageError: no token is supervised.
    """
    if not summary.supervised_tokens:
        reasons = ", ".join(f"{count:,} ({reason})" for reason, count in summary.dropped.items())
        raise UsageError(f"{source}: no supervised token in the whole set; rows dropped: {reasons or 'none'}")


def _cache_folder(source: str, maker: RowMaker, cache_dir: Path) -> Path:
    identity = json.dumps([source_fingerprint(source), maker.identity])
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
    rows = token_rows(opened, vocabulary_size)
    longest = int(rows.lengths.max())
    if longest > max_length:
        raise UsageError(
            f"{folder}: the longest row has {longest} tokens, max_length is {max_length}; raise it to {longest}, or "
            "prepare the rows with a shorter --max_length"
        )
    return rows


def _write_rows(folder: Path, source: str, maker: RowMaker) -> None:
    """Write a folder of the cache."""
    writer = RowsWriter(folder)
    try:
        write_rows([source], maker, {TRAIN: writer})
        require_supervision(writer.summary, source)
        writer.finish(identity_of(maker.encoder))
    finally:
        writer.close()
