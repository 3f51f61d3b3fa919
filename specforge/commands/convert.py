"""``specforge convert``: import a published draft, to measure it, train it further or export it."""

from __future__ import annotations

import shlex
from pathlib import Path

from jsonargparse import ArgumentParser

from specforge.commands.arguments import command_parser, parse
from specforge.imports import without_collection

DESCRIPTION = """\
Read a published draft, in safetensors or .bin files, whole or in shards, and store it in specforge's layout. The format
is detected. A tensor that is missing, unknown or of the wrong shape is an error that names it: nothing is initialised
at random. From .bin files, only tensors are unpickled.

  specforge convert owner/published-head --verifier MODEL
  specforge convert heads/mine --verifier MODEL --output mine

Then measure it (specforge evaluate), train it further (specforge fit --model.init_from) or export it."""


def run(arguments: list[str]) -> int:
    """Convert, and print what can be done with the draft."""
    found = parse(command_line(), arguments)
    with without_collection():
        from specforge.checkpoints.convert import convert

    done = convert(found.source, found.verifier, None if found.output is None else Path(found.output), found.format)
    parameters = sum(one.numel() for one in done.model.parameters())
    measure = shlex.join(["specforge", "evaluate", str(done.folder), "--prompts", "FILE"])
    algorithm = done.format.partition("/")[0]
    words = ["specforge", "fit", "--algorithm", algorithm, "--verifier", found.verifier, "--data.train", "FILE"]
    train = shlex.join([*words, "--model.init_from", str(done.folder)])
    print(
        f"Done: {done.folder} holds the draft, {parameters:,} parameters, read as {done.format}.\n"
        f"  measure it   {measure}\n"
        f"  train it     {train}"
    )
    return 0


def command_line() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("convert", "DRAFT --verifier MODEL", DESCRIPTION)
    parser.add_argument("source", type=str, metavar="DRAFT", help="Folder or hub id of the draft.")
    parser.add_argument(
        "--verifier", type=str, required=True, metavar="MODEL", help="Folder or hub id of its verifier."
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="Folder to write; by default NAME-specforge.",
    )
    parser.add_argument(
        "--format",
        type=str | None,
        default=None,
        metavar="NAME",
        help="Format of the draft, if the files are ambiguous.",
    )
    return parser
