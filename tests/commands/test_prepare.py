"""``specforge prepare rows``: its output and files, and its errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quickstart_prompts import QUICKSTART, VERIFIER

from specforge.__main__ import main
from specforge.data.text.encoding import RowEncoder

CHATS = [
    {"conversations": [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]}
    for number in range(300)
]


def rows(*words) -> int:
    return main(["prepare", "rows", *map(str, words)])


@pytest.fixture
def source(write_rows) -> Path:
    return write_rows("chats.jsonl", CHATS)


@pytest.fixture
def words(source, tmp_path) -> list[str]:
    return [str(source), "--verifier", str(VERIFIER), "--output", str(tmp_path / "rows")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_are_shown_prepared_and_summarised(words, tmp_path, capsys, monkeypatch):
    assert rows(*words, "--show", 1, "--workers", 1, "--long_rows", "drop") == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert "⟦It is 0.<|im_end|>■⟧" in printed
    splits = json.loads((tmp_path / "rows" / "summary.json").read_text())["splits"]
    assert ["rows", str(splits["train"]["rows"]), str(splits["validation"]["rows"]), "300"] in lines
    assert lines[-2][:3] == ["Done:", str(tmp_path / "rows"), "holds"]
    assert (tmp_path / "rows" / "coverage.svg").read_text().startswith("<?xml")

    before = contents(tmp_path / "rows")
    monkeypatch.setattr(RowEncoder, "encode", lambda *_: pytest.fail("tokenised again"))
    assert rows(*words, "--long_rows", "drop") == 0
    again = capsys.readouterr().out
    assert printed.endswith(again.replace("Nothing to do", "Done"))
    assert contents(tmp_path / "rows") == before


def test_fit_accepts_the_command_of_the_last_line(words, capsys, tmp_path):
    assert rows(*words, "--max_length", 64, "--workers", 1) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:2] == ["specforge", "fit"]
    last[last.index("FILE")] = str(QUICKSTART.with_suffix(".yaml"))
    short = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--output_dir", str(tmp_path / "runs")]
    assert main([*last[1:], *short]) == 0
    assert not (tmp_path / "cache" / "rows").exists()


def test_every_flag_reaches_the_workers(words, tmp_path):
    flags = ["--max_length", "40", "--validation_share", "0.25", "--seed", "7", "--workers"]
    for workers in (1, 2):
        assert rows(*words, *flags, workers) == 0
        (tmp_path / "rows").rename(tmp_path / str(workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_killed_command_leaves_no_workers(words):
    command = [sys.executable, "-m", "specforge", "prepare", "rows", *words, "--workers", "2"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
    while killed.poll() is None and len(workers := children.read_text().split()) < 3:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 120
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert killed.returncode == -signal.SIGKILL and not any(is_running(worker) for worker in workers)


def is_running(worker: str) -> bool:
    try:
        return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def heeds_ctrl_c():
    """Restore Ctrl-C, which shells ignore in background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_is_reported_and_the_next_run_resumes(words, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "specforge.data.rows.prepared.require_supervision", lambda *_: os.kill(os.getpid(), signal.SIGINT)
        )
        assert rows(*words, "--workers", 1) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(RowEncoder, "encode", lambda *_: pytest.fail("tokenised again"))
    assert rows(*words, "--workers", 1) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--sede", "1"], "unknown key 'sede'. Did you mean 'seed'?"),
        (["--validation_share", "1.5"], "validation_share: must be >=0 and <1"),
        (["--long_rows", "cut"], "long_rows"),
        (["--max_length", "many"], "max_length"),
        (["--workers", "0"], "workers"),
        (["--verifier", "/no/such/folder"], "verifier: the config.json of /no/such/folder cannot be loaded"),
        (["--output", ""], "output: is required; give it as --output"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_flags_are_named(words, tmp_path, capsys, changed, message):
    assert rows(*words, *changed) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*rows*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "broken.jsonl does not exist; give an existing file (working directory "),
        ("", "broken.jsonl is empty; it needs at least one row"),
        ("\n\n", "broken.jsonl: holds no rows"),
        (json.dumps(CHATS[0]) + "\n{", "broken.jsonl:2: invalid JSON"),
        ('{"question": "x"}\n', "broken.jsonl:1: "),
        ('{"messages": [{"role": "user", "content": 5}]}\n', "broken.jsonl:1: "),
        ('{"messages": [{"role": "user", "content": "only asked"}]}\n', "broken.jsonl:1: a row without a usable turn"),
        ('{"input_ids": [1, 2], "loss_mask": [0, 0]}\n', "no token is supervised"),
    ],
)
@pytest.mark.parametrize("show", ["0", "3"])
def test_wrong_sources_are_named_with_their_line(words, tmp_path, capsys, content, message, show):
    broken = tmp_path / "broken.jsonl"
    if content is not None:
        broken.write_text(content)
    assert rows(broken, *words[1:], "--show", show, "--workers", 1) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*rows*"))


def test_subcommands(capsys):
    assert main(["prepare", "--help"]) == main(["prepare"]) == 0
    assert "rows" in capsys.readouterr().out
    assert main(["prepare", "row"]) == 2
    assert "Did you mean 'rows'?" in capsys.readouterr().err
    assert rows() == 2
    assert "sources: none are given" in capsys.readouterr().err


def test_missing_flags_and_an_occupied_output(source, words, tmp_path, capsys):
    assert rows(source) == 2
    assert "verifier: is required; give it as --verifier" in capsys.readouterr().err
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "letter.txt").write_text("dear")
    assert rows(*words) == 2
    assert "rows holds something else" in capsys.readouterr().err
    assert (tmp_path / "rows" / "letter.txt").read_text() == "dear"
