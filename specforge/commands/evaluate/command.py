"""``specforge evaluate``: measure drafts, baselines and servers on prompt sets, and write a report."""

from __future__ import annotations

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from specforge.commands.arguments import PROPOSAL, decoding_parser, parse
from specforge.commands.evaluate.server_flags import add_server_flags, check_server_flags
from specforge.errors import UsageError
from specforge.imports import without_collection

DESCRIPTION = """\
Measure drafts on prompt sets: acceptance length, rates by position, time, and speedup over decoding without
speculation, which alternates with it on the same prompts. Baselines without a draft are measured too: a draft has to
beat them.

  specforge evaluate runs/quickstart/version_0/draft --limit 20 \\
    --prompts configs/quickstart/validation.jsonl
  specforge evaluate DRAFT_A DRAFT_B --prompts mt-bench.jsonl gsm8k.jsonl \\
    --proposal greedy dynamic_tree:depth=5
  specforge evaluate DRAFT --prompts mt-bench.jsonl --bigram_rows train.jsonl \\
    --baselines prompt_lookup bigram

--endpoint measures running servers, vLLM or SGLang, at several loads, and
estimates which number of drafted tokens is best for each.

  specforge evaluate --endpoint http://localhost:8000 --prompts bench.jsonl \\
    --baseline http://localhost:8001 --concurrency 1 8 64

Rows of prompt sets may name their category; each is measured separately. Writes results.json and report.html, one
page with plots, to --output."""


def run(arguments: list[str]) -> int:
    """Measure, print a table and write a report."""
    found = parse(command_line(), arguments)
    check_server_flags(found)
    if not found.drafts and not found.baselines and not found.endpoint:
        raise UsageError("nothing to measure: give drafts, --baselines or --endpoint")
    with without_collection():
        from specforge.commands.evaluate.evaluating import evaluate

    evaluate(found)
    return 0


def command_line() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = decoding_parser("evaluate", "DRAFT ... --prompts FILE ...", DESCRIPTION, max_new_tokens=128)
    parser.add_argument("drafts", type=str, nargs="*", metavar="DRAFT", help="Folders of runs or drafts, or hub ids.")
    parser.add_argument(
        "--prompts", type=str, nargs="+", required=True, metavar="FILE", help="Prompt sets, JSON lines."
    )
    parser.add_argument(
        "--proposal",
        type=str,
        nargs="+",
        default=[],
        metavar="METHOD",
        help=f"Proposal methods for each draft; by default its own. {PROPOSAL}",
    )
    parser.add_argument(
        "--baselines",
        type=str,
        nargs="*",
        default=["prompt_lookup"],
        metavar="METHOD",
        help="Methods without a draft.",
    )
    parser.add_argument(
        "--bigram_rows", type=str | None, default=None, metavar="ROWS", help="Rows to count bigrams from."
    )
    parser.add_argument(
        "--limit",
        type=PositiveInt | None,
        default=None,
        metavar="N",
        help="Maximum number of prompts of each set and category.",
    )
    parser.add_argument(
        "--batch_size",
        type=PositiveInt,
        default=8,
        metavar="N",
        help="Number of responses decoded in a batch. The acceptance length does not depend on it; 1 measures the time "
        "of a single user.",
    )
    add_server_flags(parser)
    parser.add_argument("--output", type=str, default="evaluation", metavar="FOLDER", help="Folder of the report.")
    return parser
