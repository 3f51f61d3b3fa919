"""``specforge prepare responses``: the quickstart's verifier answers, in process and through a real engine."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_server import local_server
from quickstart_prompts import QUESTIONS, QUICKSTART, VERIFIER

from specforge.__main__ import main
from specforge.data.rows.building import build_rows
from specforge.data.rows.summary import RowSettings
from specforge.data.text.encoding import RowEncoder
from specforge.data.text.origin import why_proxy
from specforge.data.text.sources import read_records
from specforge.data.text.template import ChatTemplate
from specforge.engines.journal import Journal
from specforge.verifier.fingerprint import fingerprint

VALIDATION = QUICKSTART / "validation.jsonl"


def responses(*words: Any) -> int:
    return main(["prepare", "responses", *map(str, words)])


def in_process(source: Path, output: Path, *words: Any) -> int:
    return responses(source, "--verifier", VERIFIER, "--output", output, "--max-new-tokens", 20, *words)


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]


@pytest.fixture
def chats(write_rows) -> Path:
    """Questions of one to three turns, one of them with an answer from another source."""
    rows = [{"turns": [QUESTIONS[(number + turn) % 2] for turn in range(1 + number % 3)]} for number in range(6)]
    messages = ({"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "42"})
    return write_rows("chats.jsonl", [*rows, {"messages": list(messages)}])


class TestInProcess:
    def test_every_turn_is_the_verifiers_own(self, chats, reply, tokenizer, tmp_path, capsys):
        assert in_process(chats, tmp_path / "out") == 0
        rows = read(tmp_path / "out")
        assert len(rows) >= 7
        replies: dict[tuple[str, ...], str] = {}
        for row in rows:
            questions = tuple(message["content"] for message in row["messages"][::2])
            replies[questions] = row["messages"][-1]["content"]
            supervised = [token for token, own in zip(row["input_ids"], row["loss_mask"], strict=True) if own]
            written = tokenizer.decode(supervised, skip_special_tokens=True)
            assert written.endswith(replies[questions]) and row["input_ids"][-len(supervised) :][-1] == supervised[-1]
        for questions, answer in replies.items():
            assert answer == reply(*questions, max_new_tokens=20)
        shown = capsys.readouterr().out
        assert "they can be the verifier's own" in shown
        assert shown.strip().endswith(
            f"specforge prepare rows {tmp_path}/out/responses.jsonl --verifier {VERIFIER} --output rows"
        )

    def test_the_quickstarts_rows_are_reproduced(self, tmp_path):
        responses(
            VALIDATION, "--verifier", VERIFIER, "--output", tmp_path / "out", "--max-new-tokens", 96, "--limit", 40
        )
        theirs = [json.loads(line) for line in VALIDATION.read_text().splitlines()[:40]]
        for row, expected in zip(read(tmp_path / "out"), theirs, strict=True):
            assert {key: row[key] for key in ("messages", "input_ids", "loss_mask")} == {
                key: expected[key] for key in ("messages", "input_ids", "loss_mask")
            }

    def test_fit_treats_the_rows_as_exact(self, chats, tokenizer, tmp_path):
        in_process(chats, tmp_path / "out", "--temperature", 0.8, "--top_k", 50)
        source = str(tmp_path / "out" / "responses.jsonl")
        rows = build_rows(source, lambda: ChatTemplate(tokenizer), 1280, RowSettings(512, "drop"), tmp_path / "cache")
        assert len(rows) == len(read(tmp_path / "out")) and rows.summary.supervised_tokens > 50
        assert why_proxy(rows.summary.origins, fingerprint(str(VERIFIER))) is None
        assert (rows.summary.origins[0].temperature, rows.summary.origins[0].top_k) == (0.8, 50)
        assert main(["prepare", "rows", source, "--verifier", str(VERIFIER), "--output", str(tmp_path / "rows")]) == 0

    def test_sampled_replies_depend_only_on_the_seed(self, chats, tmp_path):
        words = ["--temperature", 1, "--check", 0]
        for name, more in {"a": ["--batch_size", 2], "b": ["--batch_size", 7], "c": ["--seed", 1]}.items():
            in_process(chats, tmp_path / name, *words, *more)
        first, second, other = ([row["messages"] for row in read(tmp_path / name)] for name in "abc")
        assert first == second != other

    def test_the_same_command_again_generates_nothing(self, chats, tmp_path, capsys, monkeypatch):
        in_process(chats, tmp_path / "out")
        first = capsys.readouterr().out
        monkeypatch.setattr("specforge.commands.prepare.responses.load", lambda *_: pytest.fail("loaded"))
        assert in_process(chats, tmp_path / "out") == 0
        assert capsys.readouterr().out == first
        assert in_process(chats, tmp_path / "out", "--temperature", 0.5) == 2
        assert "temperature (0.0 stored, 0.5 now)" in capsys.readouterr().err

    def test_a_prompt_that_is_too_long_is_rejected(self, write_rows, tmp_path, capsys):
        source = write_rows("chats.jsonl", [{"prompt": "What now? " * 300}, {"prompt": QUESTIONS[0]}])
        assert in_process(source, tmp_path / "out") == 0
        assert len(read(tmp_path / "out")) == 1
        assert "rejected: " in (shown := capsys.readouterr().out) and "the verifier's context is 512" in shown

    def test_replies_of_another_model_are_detected(self, chats, tmp_path, capsys, monkeypatch):
        stranger = "specforge.commands.prepare.in_process.InProcessAnswerer._reply"

        def noise(self: Any, prompts: Any, turn: int) -> Any:
            from specforge.engines.generation import Reply

            generator = torch.Generator().manual_seed(turn)
            for prompt, tokens in prompts:
                produced = torch.randint(300, 1200, (12,), generator=generator).tolist()
                yield prompt, Reply("noise", "stop", 12, tokens, produced)

        monkeypatch.setattr(stranger, noise)
        assert in_process(chats, tmp_path / "out") == 0
        assert "THEY ARE NOT THE VERIFIER'S OWN" in capsys.readouterr().out
        assert {row["origin"]["fingerprint"] for row in read(tmp_path / "out")} == {""}

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--output", "out"], "sources: none are given"),
            ([VALIDATION], "output: is required"),
            ([VALIDATION, "--output", "out"], "no verifier is given; give --verifier MODEL, or --endpoint URL"),
            (
                [VALIDATION, "--output", "out", "--verifier", VERIFIER, "--template_arguments.enable_thinking", "true"],
                "template_arguments.enable_thinking: the chat template of",
            ),
            (["nowhere.jsonl", "--output", "out", "--verifier", VERIFIER], "nowhere.jsonl does not exist"),
            ([VALIDATION, "--output", "out.jsonl", "--verifier", VERIFIER], "is not a folder name"),
            ([VALIDATION, "--output", "out", "--verifier", VERIFIER, "--top_p", "2"], "top_p"),
            ([VALIDATION, "--output", "out", "--verifier", "no/where"], "no/where"),
        ],
    )
    def test_wrong_usage_is_one_message(self, words, expected, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert responses(*words) == 2
        assert expected in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


class TestThinking:
    @pytest.fixture
    def thinker(self, tmp_path) -> Path:
        """The quickstart's verifier with a template that opens replies with an empty thought if thinking is off."""
        folder = tmp_path / "thinker"
        shutil.copytree(VERIFIER, folder)
        template = (folder / "chat_template.jinja").read_text()
        opening = "'<|im_start|>assistant\\n'"
        assert opening in template
        switched = f"{opening} + ('' if enable_thinking | default(true) else '(none) ')"
        (folder / "chat_template.jinja").write_text(template.replace(opening, switched))
        return folder

    def test_template_arguments_are_used_and_turns_with_another_context_become_separate_rows(
        self, thinker, tokenizer, write_rows, tmp_path
    ):
        source = write_rows("chats.jsonl", [{"turns": QUESTIONS}])
        for thinking in ("true", "false"):
            words = [
                "--verifier",
                thinker,
                "--max_new_tokens",
                9,
                "--template_arguments.enable_thinking",
                thinking,
                "--output",
                tmp_path / thinking,
            ]
            assert responses(source, *words) == 0
        thought = {
            name: [tokenizer.decode(row["input_ids"]) for row in read(tmp_path / name)] for name in ("true", "false")
        }
        assert len(thought["true"]) == 1 and "(none)" not in thought["true"][0]
        # The thought is not part of the reply that the second turn reads.
        assert [text.count("(none)") for text in thought["false"]] == [1, 1]
        first, second = read(tmp_path / "false")
        assert sum(first["loss_mask"]) == sum(second["loss_mask"]) == 9
        assert second["loss_mask"] == sorted(second["loss_mask"])
        assert second["origin"]["template_arguments"] == {"enable_thinking": False}


class TestCheck:
    def test_own_rows_pass_before_and_after_preparation(self, tmp_path, capsys):
        assert main(["prepare", "check", str(VALIDATION), "--verifier", str(VERIFIER), "--number", "8"]) == 0
        assert "Check of 8 rows" in (shown := capsys.readouterr().out) and "they can be the verifier's own" in shown
        words = [str(VALIDATION), "--verifier", str(VERIFIER), "--output", str(tmp_path / "rows")]
        assert main(["prepare", "rows", *words]) == 0
        assert main(["prepare", "check", str(tmp_path / "rows" / "train"), "--verifier", str(VERIFIER)]) == 0

    def test_text_of_another_source_fails(self, write_rows, capsys):
        question = {"role": "user", "content": QUESTIONS[0]}
        messages = [question, {"role": "assistant", "content": "Shall I compare thee?"}]
        source = write_rows("foreign.jsonl", [{"messages": messages}] * 4)
        assert main(["prepare", "check", str(source), "--verifier", str(VERIFIER)]) == 1
        assert "THEY ARE NOT THE VERIFIER'S OWN" in capsys.readouterr().out

    def test_a_bad_row_is_named_and_skipped(self, tmp_path, capsys, caplog):
        lines = VALIDATION.read_text().splitlines()[:4]
        source = tmp_path / "odd.jsonl"
        source.write_text("\n".join([*lines, '{"messages": []}', "{"]))
        assert main(["prepare", "check", str(source), "--verifier", str(VERIFIER)]) == 0
        assert "Check of 4 rows" in capsys.readouterr().out
        assert f"{source}:5: 'messages' holds no messages" in caplog.text and f"{source}:6: invalid JSON" in caplog.text

    @pytest.mark.parametrize("words", [[], [str(VALIDATION)], ["nowhere.jsonl", "--verifier", str(VERIFIER)]])
    def test_wrong_usage_is_reported(self, words, capsys):
        assert main(["prepare", "check", *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


class TestKilled:
    @pytest.fixture
    def many(self, write_rows) -> Path:
        return write_rows("many.jsonl", [{"turns": [f"How many are {n} and 5?", "Why?"]} for n in range(250)])

    @pytest.fixture
    def processes(self, monkeypatch) -> Any:
        """Processes that start with all modules imported, but not forked from one in which torch has computed."""
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        modules = ("commands.prepare.responses", "commands.prepare.in_process", "engines.responses")
        context.set_forkserver_preload([*(f"specforge.{name}" for name in modules), "transformers.models.llama"])
        return context

    @pytest.mark.parametrize("temperature", [0, 1])
    def test_a_repeatedly_killed_run_gives_the_rows_of_an_uninterrupted_one(
        self, many, processes, tmp_path, temperature
    ):
        words = ["--temperature", temperature, "--batch-size", 5, "--max_new_tokens", 5, "--check", 2]
        journal = tmp_path / ".out.partial" / "journal.jsonl"
        chance = random.Random(temperature)
        for _ in range(10):
            size = journal.stat().st_size if journal.exists() else 0
            child = processes.Process(target=in_process, args=(many, tmp_path / "out", *words))
            child.start()
            while not journal.exists() or journal.stat().st_size <= size:
                assert child.is_alive(), "ended by itself"
                time.sleep(0.002)
            time.sleep(chance.random() * 0.08)
            child.kill()
            child.join()
            assert child.exitcode == -signal.SIGKILL
        with Journal(journal) as kept:
            assert 50 <= len(kept.finished) < 250
        in_process(many, tmp_path / "out", *words)
        in_process(many, tmp_path / "undisturbed", *words)
        for name in ("responses.jsonl", "summary.json"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl", "out", "undisturbed"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``transformers serve`` with the quickstart's verifier; its URL."""
    words = ["serve", str(VERIFIER), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    with local_server("transformers.cli.transformers", words, tmp_path_factory.mktemp("engine") / "log", {}) as url:
        yield f"{url}/v1"


class TestThroughTransformersServe:
    def test_its_replies_equal_those_in_process(self, engine, tokenizer, tmp_path, capsys):
        words = ["--limit", 12, "--max-new-tokens", 96]
        assert responses(VALIDATION, "--verifier", VERIFIER, "--output", tmp_path / "here", *words) == 0
        capsys.readouterr()
        through = ["--endpoint", engine, "--verifier", VERIFIER, "--output", tmp_path / "there"]
        assert responses(VALIDATION, *through, *words) == 0
        shown = capsys.readouterr().out
        here, there = read(tmp_path / "here"), read(tmp_path / "there")
        assert [row["messages"] for row in there] == [row["messages"] for row in here]
        assert "they can be the verifier's own" in shown
        # It returns no token ids; tokenising the text gives the same tokens here, but that is not guaranteed.
        assert "the engine returns no token ids" in shown and {row["origin"]["fingerprint"] for row in there} == {""}
        encoder = RowEncoder(ChatTemplate(tokenizer), 1280)
        encoded = encoder.encode(list(read_records(str(tmp_path / "there" / "responses.jsonl"))))
        for (row,), expected in zip(encoded, here, strict=True):
            length = len(expected["input_ids"])
            assert row.input_ids[:length].tolist() == expected["input_ids"]
            assert row.loss_mask.tolist()[:length] == [bool(own) for own in expected["loss_mask"]]

    def test_without_a_verifier_the_rows_are_a_proxy(self, engine, write_rows, tmp_path, capsys):
        source = write_rows("chats.jsonl", [{"turns": [QUESTIONS[1], QUESTIONS[1]]}])
        assert responses(source, "--endpoint", engine, "--output", tmp_path / "out", "--max_new_tokens", 96) == 0
        (row,) = read(tmp_path / "out")
        assert len(row["messages"]) == 4 and row["origin"]["fingerprint"] == ""
        assert "no verifier is given to check against" in capsys.readouterr().out

    def test_a_wrong_model_is_reported(self, engine, tmp_path, capsys):
        assert responses(VALIDATION, "--endpoint", engine, "--model", "nope", "--output", tmp_path / "out") == 1
        assert "requested 'nope'" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
