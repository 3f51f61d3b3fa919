"""The page "Your first real draft": its commands are valid, and each reads what an earlier one writes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser, capture_parser

from specforge.commands.arguments import parse
from specforge.commands.estimate.estimating import EstimateCLI
from specforge.commands.evaluate.command import command_line as evaluate_line
from specforge.commands.export import command_line as export_line
from specforge.commands.prepare.responses import command_line as responses_line
from specforge.commands.prepare.rows import command_line as rows_line
from specforge.commands.trainer import choose
from specforge.training.cli.command_line import parse as parse_run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-draft.md").read_text(encoding="utf-8")
LISTINGS = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line)[1:] for line in LISTINGS.splitlines() if line.startswith("specforge ")]


def commands_for(verifier: str) -> list[list[str]]:
    """Return the commands of one verifier, by the folder names on the page."""
    return [words for words in COMMANDS if verifier in " ".join(words)]


def run_parser(words: list[str]) -> ArgumentParser:
    return capture_parser(EstimateCLI, choose(words, ""), [], "estimate")


@pytest.mark.parametrize("verifier", ["qwen3-4b", "smollm2"])
def test_each_command_reads_what_an_earlier_one_writes(verifier, monkeypatch):
    monkeypatch.chdir(ROOT)
    names, written = [], set()
    for words in commands_for(verifier):
        names.append(" ".join(words[: 1 + (words[0] == "prepare")]))
        match words:
            case ["prepare", "responses", *flags]:
                found = parse(responses_line(), flags)
                written.add(f"{found.output}/responses.jsonl")
            case ["prepare", "rows", *flags]:
                found = parse(rows_line(), flags)
                assert set(found.sources) <= written
                written |= {f"{found.output}/train", f"{found.output}/validation"}
                longest = found.max_length
            case ["estimate" | "fit", *flags]:
                run = parse_run(run_parser(flags), flags)
                assert {run.data.train, run.data.validation} <= written and longest <= run.data.max_length
                written.add(f"{run.output_dir}/version_0")
            case ["evaluate", *flags]:
                assert set(parse(evaluate_line(), flags).drafts) <= written
            case ["export", *flags]:
                assert parse(export_line(), flags).source in written
            case _:
                pytest.fail(f"unknown command: {words}")
    assert names == ["prepare responses", "prepare rows", "estimate", "fit", "evaluate", "export"]
