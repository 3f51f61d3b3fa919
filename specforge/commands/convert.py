"""``specforge convert``: a published draft, to measure it, to train on from it, or to export it otherwise."""

from __future__ import annotations

import shlex
from pathlib import Path

from jsonargparse import ArgumentParser

from specforge.checkpoints.convert import convert
from specforge.commands.arguments import command_parser, parse

DESCRIPTION = """\
Read a published draft, in safetensors or .bin files, whole or in shards, and store it as specforge does. Which format
it is in is found out. A tensor that is missing, unknown or of the wrong shape is named and refused: nothing is left at
random. Of .bin files, nothing but tensors is ever unpickled.

  specforge convert owner/published-head --verifier MODEL
  specforge convert heads/mine --verifier MODEL --output mine

Then measure it (specforge evaluate), train on from it (specforge fit --model.init_from) or export it."""


def run(arguments: list[str]) -> int:
    """Convert, and say what can be done with the draft."""
    found = parse(command_line(), arguments)
    done = convert(found.source, found.verifier, None if found.output is None else Path(found.output), found.format)
    parameters = sum(one.numel() for one in done.model.parameters())
    measure = shlex.join(["specforge", "evaluate", str(done.folder), "--prompts", "FILE"])
    algorithm = done.format.partition("/")[0]
    words = ["specforge", "fit", "--algorithm", algorithm, "--verifier", found.verifier, "--data.train", "FILE"]
    train = shlex.join([*words, "--model.init_from", str(done.folder)])
    print(
        f"Done: {done.folder} holds the draft, {parameters:,} parameters, read as {done.format}.\n"
        f"  measure it   {measure}\n"
        f"  train on     {train}"
    )
    return 0


def command_line() -> ArgumentParser:
    """Return the parser of what is typed behind the command."""
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
        help="Format that it is in, where files alone do not tell.",
    )
    return parser
