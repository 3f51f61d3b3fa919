"""``specforge prepare rows``: convert conversations to token rows for ``fit``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from specforge.bounds import RowLength, Share
from specforge.commands.arguments import add_template_flags, command_parser, parse, template_words, verifier_text
from specforge.data.rows.summary import MAX_BAD_SHARE, RowSettings
from specforge.errors import UsageError

if TYPE_CHECKING:
    from specforge.data.rows.prepared import Prepared
    from specforge.data.text.records import RawRecord

DESCRIPTION = """\
Tokenise conversations with the verifier's tokenizer and chat template, mask tokens that the verifier does not generate,
hold out a validation share, and count the coverage of draft vocabularies. Sources are streamed, on all cores; an
interrupted run resumes when the same command is run again.

  specforge prepare rows chats.jsonl --verifier MODEL --output rows --show 2
  specforge prepare rows sharegpt.jsonl owner/name:train --verifier MODEL \\
    --output rows --max_length 4096

A source is a .jsonl, .json or .parquet file, also as .gz, or a folder of them, a folder of rows or of
datasets.save_to_disk, or a hub data set as owner/name:split. A row holds messages, ShareGPT conversations, prompt and
response or completion, instruction and output, text, or input_ids and loss_mask.

Writes --output/train and --output/validation for fit's data.train and data.validation, summary.json, coverage.svg."""


def run(arguments: list[str]) -> int:
    """Show some rows, prepare all, and print a summary."""
    found = parse(command_line(), arguments)
    if not found.sources:
        raise UsageError("sources: none are given; name at least one file, folder or hub data set")
    for name in ("verifier", "output"):
        if not getattr(found, name):
            raise UsageError(f"{name}: is required; give it as --{name}, or in the file of --config")
    from specforge.commands.prepare.coverage_plot import draw_coverage
    from specforge.commands.prepare.record_view import show_record
    from specforge.commands.prepare.rows_table import print_prepared
    from specforge.data.rows.building import make_encoder
    from specforge.data.rows.maker import RowMaker
    from specforge.data.rows.prepared import check_output, prepare_rows
    from specforge.data.text.sources import check_source

    for source in found.sources:
        check_source(source, "sources")
    output = Path(found.output)
    is_there = check_output(output) is not None
    verifier = verifier_text(found, found.verifier)
    encoder = make_encoder(found.sources, lambda: verifier.template, verifier.vocabulary_size)
    # Plain numbers, since worker processes cannot unpickle the command line's types.
    settings = RowSettings(int(found.max_length), found.long_rows, found.bad_rows, float(found.max_bad_share))
    maker = RowMaker(encoder, settings, float(found.validation_share), int(found.seed))
    console = Console(highlight=False)
    for record in _first_records(found):
        show_record(record, maker, verifier.tokenizer, console)
    prepared = prepare_rows(found.sources, maker, output, found.workers or len(os.sched_getaffinity(0)))
    plot = output / "coverage.svg"
    if not plot.exists():
        draw_coverage(prepared.coverage, plot)
    print_prepared(prepared, console)
    print(f"\n{'Nothing to do' if is_there else 'Done'}: {_closing_lines(found, prepared)}")
    return 0


def command_line() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("prepare rows", "SOURCE ... --verifier MODEL --output FOLDER", DESCRIPTION)
    parser.add_argument("sources", type=str, nargs="*", metavar="SOURCE", help="Sources of the rows.")
    parser.add_argument(
        "--verifier", type=str | None, default=None, metavar="MODEL", help="Folder or hub id; required."
    )
    parser.add_argument(
        "--verifier_revision", type=str | None, default=None, metavar="NAME", help="Its branch, tag or commit."
    )
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="Run code from its repository.")
    add_template_flags(parser)
    parser.add_argument("--output", type=str | None, default=None, metavar="FOLDER", help="Folder to write; required.")
    parser.add_argument("--max_length", type=RowLength, default=2048, metavar="N", help="Maximum tokens of a row.")
    parser.add_argument(
        "--long_rows", type=Literal["truncate", "drop"], default="truncate", help="Truncate longer rows, or drop them."
    )
    parser.add_argument(
        "--bad_rows",
        type=Literal["drop", "refuse"],
        default="drop",
        help="Drop rows that cannot be trained on, or stop at the first.",
    )
    parser.add_argument(
        "--max_bad_share",
        type=Share,
        default=MAX_BAD_SHARE,
        metavar="SHARE",
        help="Maximum share of bad rows; more end the run.",
    )
    parser.add_argument(
        "--validation_share", type=Share, default=0.05, metavar="SHARE", help="Share of the rows to hold out."
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=42, metavar="N", help="Seed of the split.")
    parser.add_argument(
        "--workers",
        type=PositiveInt | None,
        default=None,
        metavar="N",
        help="Processes; by default one per core.",
    )
    parser.add_argument(
        "--show",
        type=NonNegativeInt,
        default=0,
        metavar="N",
        help="First print N rows with supervised tokens highlighted.",
    )
    return parser


def _first_records(found: Namespace) -> Iterator[RawRecord]:
    from specforge.data.text.sources import read_raw_records

    return islice(chain.from_iterable(map(read_raw_records, found.sources)), found.show)


def _closing_lines(found: Namespace, prepared: Prepared) -> str:
    from specforge.data.rows.maker import TRAIN, VALIDATION

    output = Path(found.output)
    words = ["specforge", "fit", "--config", "FILE", "--verifier", found.verifier, "--data.train", str(output / TRAIN)]
    if VALIDATION in prepared.splits:
        words += ["--data.validation", str(output / VALIDATION)]
    words += ["--data.max_length", str(found.max_length), *template_words(found, "data.")]
    line = shlex.join(words)
    return f"{output} holds the rows, summary.json and coverage.svg. To train on them, with a recipe as FILE:\n  {line}"
