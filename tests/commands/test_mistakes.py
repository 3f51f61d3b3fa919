"""Typical mistakes of new users, and their error messages."""

from __future__ import annotations

import pytest

from specforge.__main__ import main

CONFIG = "configs/quickstart.yaml"
SEE = "see: specforge {} --help"


@pytest.mark.parametrize(
    ("words", "command", "expected"),
    [
        (["fit"], "fit", ["no algorithm is chosen", "--config FILE", "--algorithm"]),
        (["fit", CONFIG], "fit", [f"--config {CONFIG}"]),
        (["fit", "--config"], "fit", ["--config needs a value"]),
        (["fit", "--config", CONFIG, "more.yaml"], "fit", ["unexpected argument 'more.yaml'", SEE.format("fit")]),
        (["fit", "--config", CONFIG, "--model.ttt_steps"], "fit", ["--model.ttt_steps needs a value"]),
        (["fit", "--config", CONFIG, "--model.ttt_steps", "three"], "fit", ["expected an integer, got 'three'"]),
        (["estimate", "--config", CONFIG, "--tokens", "many"], "estimate", ["tokens: expected an integer, got 'many'"]),
        (["prepare", "row"], "prepare", ["unknown subcommand 'row'", "Did you mean 'rows'?"]),
        (["prepare", "rows"], "prepare rows", ["sources: none are given"]),
        (["prepare", "rows", "a.jsonl", "--verifier"], "prepare rows", ["--verifier needs a value"]),
        (["prepare", "rows", "a.jsonl", "--max_length", "x"], "prepare rows", ["max_length: expected an integer"]),
        (["prepare", "check"], "prepare check", ["rows: none are given"]),
        (["prepare", "check", "a.jsonl"], "prepare check", ["verifier: is required", "--verifier"]),
        (["prepare", "responses"], "prepare responses", ["sources: none are given"]),
        (["prepare", "features"], "prepare features", ["output: is required"]),
        (["generate"], "generate", ["draft: none is given", "--proposal prompt_lookup"]),
        (["generate", "draft", "other"], "generate", ["unexpected argument 'other'", SEE.format("generate")]),
        (["evaluate"], "evaluate", ["required: --prompts", SEE.format("evaluate")]),
        (["export"], "export", ["required: DRAFT, --format", SEE.format("export")]),
        (["convert", "draft"], "convert", ["required: --verifier"]),
        (["verify"], "verify", ["required: EXPORT"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_says_what_to_do(words, command, expected, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    [line] = shown.err.splitlines()
    assert line.startswith(f"specforge {command}: error: ") and not shown.out
    assert all(part in line for part in expected), line
