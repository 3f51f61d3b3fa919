"""Commands start fast: they import no more than they need, and without collections of garbage."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from specforge.hookspecs import Command
from specforge.imports import without_collection
from specforge.registry import installed

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "transformers", "lightning", "datasets", "pyarrow", "matplotlib", "openai")
PREPARE = [["prepare", name] for name in ("rows", "features", "responses", "check")]
MISTAKES = [
    *(["generate", "draft", "--temprature", "1"], ["generate"], ["generate", "draft", "--top_k", "many"], ["evaluate"]),
    *(["convert", "draft"], ["export"], ["verify"], ["estimate"], ["fit"], ["doctor", "--endpoint"]),
    *(
        ["prepare", "rows", "a.jsonl"],
        ["prepare", "responses"],
        ["prepare", "check"],
        ["prepare", "features", "--dtype"],
    ),
    ["serve-verifier", "--port", "none"],
]
CODE = """
import contextlib, io, json, sys
from specforge.__main__ import main
found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as exit:
            status = exit.code or 0
    found.append([words, status, [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(found))
"""


def imported(commands: list[list[str]], names: tuple[str, ...]) -> list[tuple[list[str], int, list[str]]]:
    """Run commands in one process; return their status and which libraries were imported by the end of each."""
    arguments = [json.dumps(commands), json.dumps(names)]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
    return [tuple(entry) for entry in json.loads(done.stdout)]


def test_help_and_mistakes_import_nothing_slow() -> None:
    helps = [[name, "--help"] for name in sorted(installed().all(Command))]
    helps += [[*words, "--help"] for words in PREPARE]
    # The first command that imports something shows.
    found = imported([*helps, *MISTAKES], SLOW)
    assert [entry for entry in found if entry[2]][:1] == []
    assert [entry for entry in found if entry[1] != (0 if entry[0] in helps else 2)] == []


def test_settings_without_servers_import_no_client() -> None:
    words = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--print_config"]
    assert imported([words], ("torch", "openai", "datasets")) == [(words, 0, ["torch"])]


class TestWithoutCollection:
    @pytest.fixture
    def torch_unimported(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        gc.unfreeze()
        monkeypatch.delitem(sys.modules, "torch")
        yield
        gc.unfreeze()

    @pytest.mark.usefixtures("torch_unimported")
    def test_objects_of_imports_are_left_out_of_later_collections(self):
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0

    @pytest.mark.usefixtures("torch_unimported")
    def test_collects_again_after_an_error(self):
        with pytest.raises(ImportError), without_collection():
            raise ImportError
        assert gc.isenabled()

    def test_leaves_a_process_as_it_is_that_has_imported_torch(self):
        before = gc.get_freeze_count()
        with without_collection():
            assert gc.isenabled()
        assert gc.get_freeze_count() == before

    @pytest.mark.usefixtures("torch_unimported")
    def test_does_not_start_a_collector_that_is_off(self):
        gc.disable()
        try:
            with without_collection():
                pass
            assert not gc.isenabled()
        finally:
            gc.enable()
