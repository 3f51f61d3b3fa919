"""``specforge generate``: the text is the verifier's own for all kinds of input; errors are one line."""

from __future__ import annotations

import io

import pytest
from quickstart_prompts import QUESTIONS, VERIFIER

from specforge.__main__ import main


def generate(*words) -> int:
    return main(["generate", *map(str, words)])


@pytest.mark.parametrize("proposal", ["greedy", "static_tree:depth=2", "dynamic_tree:depth=3,expansion_factor=4"])
def test_a_prompt_gets_the_verifiers_own_answer(draft_folder, reply, capsys, proposal):
    assert generate(draft_folder, "--prompt", QUESTIONS[0], "--proposal", proposal, "--max-new-tokens", 30) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == reply(QUESTIONS[0], max_new_tokens=30)
    assert "tokens per verifier pass" in shown.err and "LOSSY" not in shown.err


def test_a_method_without_a_draft_needs_only_a_verifier(reply, capsys):
    words = ["--verifier", VERIFIER, "--proposal", "prompt_lookup", "--prompt", QUESTIONS[1], "--max_new_tokens", 20]
    assert generate(*words) == 0
    assert capsys.readouterr().out.strip() == reply(QUESTIONS[1], max_new_tokens=20)


def test_a_file_is_answered_conversation_by_conversation(draft_folder, reply, write_rows, capsys):
    file = write_rows("prompts.jsonl", [{"turns": QUESTIONS}, {"prompt": QUESTIONS[1]}])
    assert generate(draft_folder, "--file", file, "--max_new_tokens", 20) == 0
    expected = []
    for turns in ([QUESTIONS[0]], QUESTIONS, [QUESTIONS[1]]):
        expected += [f"> {turns[-1]}", *reply(*turns, max_new_tokens=20).strip().splitlines()]
    assert capsys.readouterr().out.strip().splitlines() == expected


def test_typed_prompts_are_a_chat_until_an_empty_line(draft_folder, reply, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*QUESTIONS, "", "not read"])))
    assert generate(draft_folder, "--max_new_tokens", 20) == 0
    expected = [reply(QUESTIONS[0], max_new_tokens=20), reply(*QUESTIONS, max_new_tokens=20)]
    assert capsys.readouterr().out.split() == " ".join(expected).split()


def test_accepted_tokens_are_coloured(draft_folder, reply, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    # A tree this broad holds the right token even for a random draft.
    broad = "static_tree:initial_branching_factor=300,depth=1"
    words = ["--prompt", QUESTIONS[0], "--proposal", broad, "--max_new_tokens", 30]
    generate(draft_folder, *words)
    plain = capsys.readouterr().out
    generate(draft_folder, *words, "--show-drafts")
    coloured = capsys.readouterr().out
    assert "\x1b[" not in plain and "\x1b[30;102m" in coloured
    assert coloured.replace("\x1b[30;102m", "").replace("\x1b[0m", "") == plain


def test_lossy_settings_print_a_warning(draft_folder, capsys):
    words = ["--prompt", QUESTIONS[0], "--max_new_tokens", 5]
    generate(draft_folder, *words, "--verification", "typical", "--temperature", "1")
    assert "LOSSY" in capsys.readouterr().err
    generate(draft_folder, *words, "--proposal", "greedy:verifier_accept_k=3")
    assert "LOSSY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "x", "--file", "y"], ["--prompt and --file exclude each other"]),
        (["--prompt", " "], ["--prompt is empty"]),
        (["--file", "nowhere.jsonl"], ["--file", "nowhere.jsonl does not exist"]),
        (["--prompt", "x", "--proposal", "greddy"], ["'greddy'", "Did you mean 'greedy'"]),
        (["--prompt", "x", "--proposal", "greedy:tokens=3"], ["'tokens'", "allowed", "speculative_tokens"]),
        (["--prompt", "x", "--proposal", "greedy:speculative_tokens=three"], ["speculative_tokens", "integer"]),
        (["--prompt", "x", "--proposal", "bigram"], ["table", "required"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature", "greater than or equal to 0"]),
        (["--prompt", "x", "--top_p", "2"], ["top_p", "less than or equal to 1"]),
        (["--prompt", "x", "--verification", "blok"], ["verification", "token or block or typical"]),
        (["--prompt", "x", "--max_new_tokens", "0"], ["max_new_tokens"]),
        (["--promt", "x"], ["'promt'", "Did you mean 'prompt'"]),
        (["--prompt", "word " * 600], ["the verifier's context is 512", "shorten the prompt"]),
        (
            [
                "--prompt",
                "x",
                "--verification",
                "block",
                "--proposal",
                "static_tree:sampled=true",
                "--temperature",
                "1",
            ],
            ["block verification takes a chain"],
        ),
    ],
)
def test_errors_are_one_line(draft_folder, capsys, words, expected):
    assert generate(draft_folder, *words) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("specforge generate: error: ")
    assert all(part in message for part in expected), message


def test_a_missing_draft_and_a_missing_verifier_are_named(draft_folder, tmp_path, capsys):
    assert generate(tmp_path / "none", "--prompt", "x") == 2
    assert f"{tmp_path / 'none'} is not a folder" in capsys.readouterr().err
    assert generate(draft_folder, "--verifier", tmp_path / "none", "--prompt", "x") == 2
    assert "verifier: " in capsys.readouterr().err
    assert generate("--prompt", "x", "--proposal", "prompt_lookup") == 2
    assert "--verifier" in capsys.readouterr().err


def test_a_draft_of_another_verifier_is_rejected(draft_folder, tiny_verifiers, capsys):
    tokenizer_free = tiny_verifiers["llama"].folder
    assert generate(draft_folder, "--verifier", tokenizer_free, "--prompt", "x") == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and ("vocabulary of 1,280" in message or "tokenizer" in message)
