"""The completion script: bash accepts it, and it offers the commands' options and values."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from specforge.__main__ import main
from specforge.hookspecs import Command
from specforge.registry import installed

# Prints what bash would offer at the end of a line.
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_shtab_specforge 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    capture = pytest.MonkeyPatch()
    path = tmp_path_factory.mktemp("completion") / "specforge"
    with path.open("w") as file, capture.context() as patch:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


def test_bash_accepts_it(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["exp"], ["export"]),
        (["prepare", ""], ["rows", "responses", "check", "features"]),
        (["prepare", "rows", "--long"], ["--long_rows"]),
        (["prepare", "rows", "--long_rows", "d"], ["drop"]),
        (["plugins", ""], ["new"]),
        (["export", "--dtype", ""], ["bf16", "fp16", "fp32"]),
        (["generate", "--verb"], ["--verbose"]),
        (["fit", "--model.ttt"], ["--model.ttt_steps"]),
        (["validate", "--model.stage"], ["--model.stage_two"]),
        (["estimate", "--tok"], ["--tokens"]),
        (["completion", "ba"], ["bash"]),
        (["fit", "--algorithm", "ea"], ["eagle", "eagle3"]),
        (["export", "--format", "v"], ["vllm"]),
        (["evaluate", "--proposal", "dyn"], ["dynamic_tree"]),
    ],
    ids=" ".join,
)
def test_it_offers(script, words, expected):
    assert set(expected) <= offered(script, words)


def test_it_offers_every_command(script):
    assert offered(script, [""]) == set(installed().all(Command))


def offered(script: Path, words: list[str]) -> set[str]:
    command = ["bash", "-c", ASK, "ask", script, "specforge", *words]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_every_command_of_the_core_has_a_parser():
    for command in next(plugin for plugin in installed().plugins if plugin.name == "core").descriptors:
        if isinstance(command, Command):
            assert installed().load(command, "parser")().format_help()


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "specforge" in capsys.readouterr().out
