"""``specforge generate``: answer prompts by speculative decoding."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from specforge.commands.arguments import PROPOSAL, decoding_parser, parse
from specforge.errors import UsageError
from specforge.imports import without_collection

DESCRIPTION = """\
Answer prompts by speculative decoding with a draft. The text is the verifier's own: token for token at temperature 0,
in distribution above. Without --prompt and --file, prompts are read from the terminal; an empty line ends the chat.

  specforge generate runs/quickstart/version_0/draft --show-drafts \\
    --prompt "It is 60 km to the library. Maya cycles 20 km per hour. \\
How long is the way?"
  specforge generate DRAFT --file prompts.jsonl --proposal dynamic_tree:depth=5
  specforge generate --verifier MODEL --proposal prompt_lookup"""


def run(arguments: list[str]) -> int:
    """Answer prompts, streaming."""
    found = parse(command_line(), arguments)
    if found.prompt is not None and found.file is not None:
        raise UsageError("--prompt and --file exclude each other; give one of them")
    if found.prompt is not None and not found.prompt.strip():
        raise UsageError("--prompt is empty; give a text to answer")
    if found.draft is None and found.proposal is None:
        raise UsageError(
            "draft: none is given; name a folder or hub id, or use a method without a draft: --verifier MODEL "
            "--proposal prompt_lookup"
        )
    with without_collection():
        from specforge.commands.chat import answer_prompts

    answer_prompts(found)
    return 0


def command_line() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = decoding_parser("generate", "DRAFT", DESCRIPTION, max_new_tokens=256)
    parser.add_argument("draft", type=str, nargs="?", metavar="DRAFT", help="Folder of a run or a draft, or hub id.")
    parser.add_argument("--prompt", type=str | None, default=None, metavar="TEXT", help="Text to answer.")
    parser.add_argument("--file", type=str | None, default=None, metavar="FILE", help="A prompt set, JSON lines.")
    parser.add_argument("--proposal", type=str | None, default=None, metavar="METHOD", help=PROPOSAL)
    parser.add_argument(
        "--show_drafts",
        action="store_true",
        help="Highlight the draft's accepted tokens, in color or between ⟦ and ⟧.",
    )
    return parser
