"""Terminal output: as wide as the terminal, without unwanted colors, and without messages of other libraries."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from quickstart_prompts import VERIFIER
from rich.cells import cell_len

from specforge.__main__ import main
from specforge.hookspecs import Algorithm, Command, Objective
from specforge.quiet import is_verbose
from specforge.registry import installed
from specforge.training.cli.settings_help import SECTIONS, TRAINER

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
PROMPTS = str(ROOT / "configs" / "quickstart" / "validation.jsonl")
ALGORITHMS = [name for name, algorithm in installed().all(Algorithm).items() if algorithm.module is not None]
HELP = [
    [],
    *([name] for name in installed().all(Command) if name != "fit"),
    *(["prepare", name] for name in ("rows", "responses", "check", "features")),
    ["plugins", "new"],
    ["fit"],
]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def output_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        assert main(words) == 0
    except SystemExit as left:  # argparse, after its help
        assert left.code == 0
    return capsys.readouterr().out


def too_wide(text: str) -> list[str]:
    return [line for line in text.splitlines() if cell_len(line.rstrip()) > 80]


@pytest.mark.parametrize("words", HELP, ids=lambda words: " ".join(words) or "specforge")
def test_help_fits(words, capsys):
    text = output_of([*words, "--help"], capsys)
    assert text.startswith("usage: specforge") and not too_wide(text)


@pytest.mark.parametrize("words", [["plugins"], ["doctor"]], ids=" ".join)
def test_lists_fit(words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main(words)
    # Paths are not wrapped.
    assert not [line for line in too_wide(capsys.readouterr().out) if len(line.split()[-1]) < 40]


TABLES = {
    "estimate": ["estimate", "--config", CONFIG, "--tokens", "123456789012"],
    "prepare rows": ["prepare", "rows", PROMPTS, "--verifier", str(VERIFIER), "--workers", "1", "--output", "here"],
    "prepare responses": [
        "prepare",
        "responses",
        PROMPTS,
        "--verifier",
        str(VERIFIER),
        "--limit",
        "2",
        "--output",
        "here",
    ],
    "evaluate": ["evaluate", "DRAFT", "--prompts", PROMPTS, "--limit", "2", "--max_new_tokens", "4"],
}


@pytest.mark.parametrize("words", TABLES.values(), ids=TABLES)
def test_tables_fit(words, draft_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    words = [str(draft_folder) if word == "DRAFT" else word for word in words]
    if "estimate" in words:
        words += ["--verifier", str(VERIFIER)]
    text = output_of(words, capsys)
    # The terminal wraps sentences; commands are not wrapped, for copying.
    tables = [line for line in text.splitlines() if ": " not in line and "specforge " not in line]
    assert len(tables) > 3 and not too_wide("\n".join(tables))
    assert "\x1b[" not in text


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_settings_fit_and_begin_with_those_of_the_draft(algorithm, capsys):
    text = output_of(["fit", "--algorithm", algorithm, "--help"], capsys)
    assert not too_wide(text)
    keys = re.findall(r"^  --([\w.]+)", text, re.MULTILINE)
    first = {part: next(at for at, key in enumerate(keys) if key.startswith(f"{part}.")) for part in SECTIONS}
    assert list(first.values()) == sorted(first.values()) and first["model"] == 0
    assert not re.search(r"Annotated|Optional|Union|typing|class '|``|subclass", text)
    assert all(name in text for name in installed().all(Objective))


def test_help_explains_keys_that_the_trainer_has():
    assert set(TRAINER) <= set(inspect.signature(Trainer).parameters)


def test_other_libraries_print_nothing(tmp_path):
    words = ["fit", "--config", CONFIG, "--verifier", str(VERIFIER), "--trainer.fast_dev_run", "1"]
    words += ["--output_dir", str(tmp_path), "--data.train", PROMPTS, "--data.validation", PROMPTS]
    # In a new process, since this one is already configured.
    chosen = ("SPECFORGE_", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE", "HF_DATASETS_DISABLE", "PYTHONWARNINGS")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    done = subprocess.run(
        [sys.executable, "-m", "specforge", *words], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == ""


def test_verbose_shows_their_messages_and_tracebacks(capsys, monkeypatch):
    monkeypatch.setenv("SPECFORGE_VERBOSE", "0")  # restored at the end
    assert main(["prepare", "rows"]) == 2
    quiet = capsys.readouterr().err
    assert quiet.startswith("specforge prepare rows: error: ") and len(quiet.splitlines()) == 1
    assert not is_verbose()
    assert main(["--verbose", "prepare", "rows"]) == 2
    verbose = capsys.readouterr().err
    assert "Traceback" in verbose and verbose.endswith(quiet)
    assert is_verbose()


def test_without_color_accepted_tokens_are_marked_by_brackets(draft_folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    broad = "static_tree:initial_branching_factor=300,depth=1"
    words = ["generate", str(draft_folder), "--prompt", "How many days are 3 weeks?", "--proposal", broad]
    plain = output_of(words, capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    signs = output_of([*words, "--show-drafts"], capsys)
    assert "⟦" in signs and "\x1b[" not in signs
    assert signs.replace("⟦", "").replace("⟧", "") == plain
