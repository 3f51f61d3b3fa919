"""``specforge prepare check``: check whether the responses in some rows are the verifier's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from specforge.commands.arguments import add_verifier_flags, command_parser, load, parse
from specforge.data.text.bad_rows import BadRow
from specforge.data.text.records import RawRecord
from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specforge.data.text.encoding import RowEncoder, TokenRow
    from specforge.data.text.template import ChatTemplate
    from specforge.verifier.on_policy import PolicyCheck

_log = logging.getLogger(__name__)

DESCRIPTION = """\
Check whether responses are the verifier's own: their probability under the verifier is compared with the expected
probability of its own text. A draft trained on other text learns to predict tokens that its verifier does not generate.

  specforge prepare check rows.jsonl --verifier MODEL --number 64

The exit status is 1 if they are not."""


def run(arguments: list[str]) -> int:
    """Check evenly spaced rows, and print the figures."""
    found = parse(command_line(), arguments)
    if not found.rows:
        raise UsageError("rows: none are given; name a file, folder or hub data set")
    if not found.verifier:
        raise UsageError("verifier: is required; give it as --verifier, or in the file of --config")
    from specforge.data.text.sources import check_source, count_records, read_raw_records

    check_source(found.rows, "rows")
    step = max(count_records(found.rows) // found.number, 1)
    chosen = islice(read_raw_records(found.rows), 0, step * found.number, step)
    check = check_rows(*load(found, found.verifier), chosen)
    if check is None:
        raise UsageError(f"{found.rows}: the checked rows have no response tokens")
    print_check(check, Console(highlight=False))
    return 0 if check.is_own else 1


def command_line() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("prepare check", "ROWS --verifier MODEL", DESCRIPTION)
    parser.add_argument("rows", type=str, nargs="?", metavar="ROWS", help="A file, folder or hub data set with rows.")
    add_verifier_flags(parser, "Folder or hub id; required.")
    parser.add_argument("--number", type=PositiveInt, default=64, metavar="N", help="Rows to check.")
    return parser


def check_rows(verifier: PreTrainedModel, template: ChatTemplate, records: Iterable[RawRecord]) -> PolicyCheck | None:
    """Compare the responses in rows with what a verifier would have generated; None if there are none.

    A row is assumed to be sampled at the temperature in its ``origin``, or else 1. Bad rows are skipped with a warning.

    Raises:
        UsageError: A row was written with other template arguments.
    """
    import torch

    from specforge.data.text.encoding import RowEncoder
    from specforge.verifier.on_policy import check_policy

    encoder = RowEncoder(template, verifier.config.get_text_config().vocab_size)
    return check_policy(
        verifier,
        (
            (
                torch.from_numpy(row.input_ids).long(),
                torch.from_numpy(row.loss_mask),
                1.0 if row.origin is None else row.origin.temperature,
            )
            for record in tqdm(records, "check", unit=" rows", disable=None)  # None shows it on a terminal only
            for row in _rows(encoder, record)
        ),
    )


def _rows(encoder: RowEncoder, record: RawRecord) -> list[TokenRow]:
    try:
        (rows,) = encoder.encode([record.parse()])
    except BadRow as error:
        rows = error
    if isinstance(rows, BadRow):
        _log.warning("skipped: %s", rows)
        return []
    return rows


def print_check(check: PolicyCheck, console: Console) -> None:
    """Print the figures of a check and the conclusion."""
    verdict = "they can be the verifier's own" if check.is_own else "THEY ARE NOT THE VERIFIER'S OWN"
    console.print(
        Text(
            f"Check of {check.rows:,} rows, {check.tokens:,} tokens: mean log-probability {check.log_prob:.3f}, "
            f"{check.expected:.3f} expected of the verifier's own, at least {check.limit:.3f}: {verdict}.",
            style="" if check.is_own else "bold red",
        ),
        soft_wrap=True,
    )
