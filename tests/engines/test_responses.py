"""Rows of responses, their journal, and the output folder."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge.data.text.prompts import Conversation
from specforge.engines.generation import GenerationSettings, Keep, Prompt, Refuse, Reply, iter_prompts, rows_of
from specforge.engines.journal import Journal
from specforge.engines.responses import write_responses
from specforge.errors import SpecforgeError, UsageError
from specforge.files import locked
from specforge.sampling import Sampling

ORIGIN = {"model": "m", "fingerprint": "f", "temperature": 0.0}


def conversation(turns: int) -> Conversation:
    return Conversation(tuple([{"role": "user", "content": f"ask {turn}"}] for turn in range(turns)), "here:1")


def reply(prompt: list[int], produced: list[int]) -> Reply:
    return Reply(" ".join(map(str, produced)), "stop", len(produced), prompt, produced)


def answered(index: int) -> tuple[Prompt, list[Reply]]:
    return Prompt(index, conversation(1)), [reply([1, index], [5, 6, 2])]


class TestRowsOf:
    def test_turns_that_continue_the_exact_tokens_are_one_row(self):
        rows = rows_of(conversation(2), [reply([1, 2], [3, 4]), reply([1, 2, 3, 4, 9, 9], [5])])
        assert [(row["input_ids"], row["loss_mask"]) for row in rows] == [
            ([1, 2, 3, 4, 9, 9, 5], [0, 0, 1, 1, 0, 0, 1])
        ]
        assert [message["content"] for message in rows[0]["messages"]] == ["ask 0", "3 4", "ask 1", "5"]

    def test_a_turn_with_other_prompt_tokens_begins_a_row(self):
        rows = rows_of(conversation(2), [reply([1, 2], [3, 4]), reply([1, 2, 7, 9, 9], [5])])
        assert [(row["input_ids"], row["loss_mask"]) for row in rows] == [
            ([1, 2, 3, 4], [0, 0, 1, 1]),
            ([1, 2, 7, 9, 9, 5], [0, 0, 0, 0, 0, 1]),
        ]
        assert [len(row["messages"]) for row in rows] == [2, 4]

    def test_without_tokens_there_are_only_messages(self):
        assert rows_of(conversation(1), [Reply("yes", "stop", 2)]) == [
            {"messages": [{"role": "user", "content": "ask 0"}, {"role": "assistant", "content": "yes"}]}
        ]

    def test_a_tokenised_prompt_has_no_messages(self):
        assert rows_of(Conversation(([1, 2],), "here:1"), [reply([1, 2], [3])]) == [
            {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}
        ]

    @given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(3, 9)), st.lists(st.integers(3, 9), min_size=1))))
    def test_every_generated_token_is_supervised_once_after_its_context(self, turns):
        if not turns:
            return
        replies: list[Reply] = []
        for continues, more, produced in turns:
            before = [*replies[-1].prompt_ids, *replies[-1].token_ids] if replies and continues else [1]
            replies.append(reply(before + more, produced))
        rows = rows_of(conversation(len(turns)), replies)
        found = [
            (row["input_ids"][:index], token)
            for row in rows
            for index, token in enumerate(row["input_ids"])
            if row["loss_mask"][index]
        ]
        expected = [
            (answer.prompt_ids + answer.token_ids[:index], token)
            for answer in replies
            for index, token in enumerate(answer.token_ids)
        ]
        assert found == expected


class TestPrompts:
    def test_messages_take_precedence_over_tokens(self, write_lines):
        turns = zip(["user", "assistant"] * 2, "abcd", strict=True)
        messages = [{"role": role, "content": content} for role, content in turns]
        source = write_lines([{"messages": messages, "input_ids": [1, 2], "loss_mask": [0, 1]}])
        (prompt,) = iter_prompts([source])
        assert [turn[0]["content"] for turn in prompt.conversation.turns] == ["a", "c"]

    def test_indices_count_over_all_sources(self, write_lines):
        sources = [write_lines([{"prompt": "x"}] * 3, f"{name}.jsonl") for name in "ab"]
        assert [prompt.index for prompt in iter_prompts(sources, limit=5)] == [0, 1, 2, 3, 4]

    def test_seeds_differ_by_index_and_turn(self):
        generation = GenerationSettings(Sampling(), 5, seed=3)
        seeds = {generation.seed_of(index, turn) for index in range(100) for turn in range(5)}
        assert len(seeds) == 500 and all(0 <= seed < 2**31 for seed in seeds)
        assert generation.seed_of(7, 1) == GenerationSettings(Sampling(temperature=1), 9, seed=3).seed_of(7, 1)
        assert generation.seed_of(7, 1) != GenerationSettings(Sampling(), 5, seed=4).seed_of(7, 1)


class TestJournal:
    def test_rows_are_read_in_the_order_of_the_prompts(self, tmp_path):
        with Journal(tmp_path / "journal") as journal:
            for block in ([4, 5], [0, 1], [2, 3]):
                journal.append([answered(index) for index in block])
            assert [row["input_ids"][1] for row in journal.rows()] == [0, 1, 2, 3, 4, 5]

    def test_an_incomplete_last_line_is_removed(self, tmp_path):
        path = tmp_path / "journal"
        with Journal(path) as journal:
            journal.append([answered(0), answered(1)])
            first = path.stat().st_size
            journal.append([answered(2)])
        complete = path.read_bytes()
        for size in range(first, len(complete)):
            path.write_bytes(complete[:size])
            with Journal(path) as journal:
                assert journal.finished == {0, 1} and journal.tally.tokens == 6
                journal.append([answered(2)])
            assert path.read_bytes() == complete

    def test_garbage_at_the_end_is_removed(self, tmp_path):
        path = tmp_path / "journal"
        with Journal(path) as journal:
            journal.append([answered(0)])
        complete = path.read_bytes()
        path.write_bytes(complete + b"\0" * 100 + b"\n")
        with Journal(path) as journal:
            assert journal.finished == {0}
        assert path.read_bytes() == complete

    def test_a_tally_is_the_same_when_read_again(self, tmp_path):
        with Journal(tmp_path / "journal") as journal:
            journal.append([answered(0)])
            journal.append([(Prompt(1, conversation(1)), [Reply("cut", "length", 7)])])
            tally = journal.tally
        with Journal(tmp_path / "journal") as again:
            assert again.tally == tally
        assert (tally.rows, tally.tokens, tally.with_tokens, tally.finishes["length"]) == (2, 10, 1, 1)


@pytest.fixture
def prompts(write_lines) -> str:
    return write_lines([{"prompt": f"ask {number}"} for number in range(20)], "prompts.jsonl")


def answer_all(prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
    for prompt in prompts:
        keep([answered(prompt.index)])


def write(prompts: str, output: Path, answer: Any = answer_all, **settings: Any) -> Any:
    return write_responses([prompts], None, {"seed": 0, **settings}, output, answer, lambda journal: (ORIGIN, {}))


def test_a_source_without_rows_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match=r"blank\.jsonl: holds no prompts"):
        write(str(tmp_path / "blank.jsonl"), tmp_path / "out")


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]


class TestFolder:
    def test_holds_the_rows_in_order_with_their_origin(self, prompts, tmp_path):
        def backwards(prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
            answer_all(iter(list(prompts)[::-1]), keep, refuse)

        responses = write(prompts, tmp_path / "out", backwards)
        rows = read(tmp_path / "out")
        assert [row["input_ids"][1] for row in rows] == list(range(20))
        assert all(row["origin"] == ORIGIN for row in rows)
        assert responses.tally.conversations == 20
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.jsonl"]

    def test_is_not_written_again(self, prompts, tmp_path):
        first = write(prompts, tmp_path / "out")
        again = write(prompts, tmp_path / "out", lambda *_: pytest.fail("asked again"))
        assert again == first

    def test_refused_prompts_are_left_out_and_reported(self, prompts, tmp_path):
        def refusing(prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
            for prompt in prompts:
                keep([answered(prompt.index)]) if prompt.index % 2 else refuse(prompt, "too long")

        responses = write(prompts, tmp_path / "out", refusing)
        assert [row["input_ids"][1] for row in read(tmp_path / "out")] == list(range(1, 20, 2))
        assert responses.refused[f"{prompts}:1"] == "too long" and len(responses.refused) == 10

    def test_nothing_answered_is_an_error_that_leaves_nothing(self, prompts, tmp_path):
        def refusing(prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
            for prompt in prompts:
                refuse(prompt, "too long")

        with pytest.raises(SpecforgeError, match=r"none of the 20 prompts was answered.*prompts.jsonl:1: too long"):
            write(prompts, tmp_path / "out", refusing)
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]

    def test_a_bad_prompt_is_found_before_the_first_request(self, write_lines, tmp_path):
        source = write_lines([{"prompt": "x"}] * 5 + [{"prommpt": "y"}])
        with pytest.raises(UsageError, match=r"train.jsonl:6: a row without a prompt"):
            write(source, tmp_path / "out", lambda *_: pytest.fail("asked"))

    def test_one_bad_prompt_among_many_is_left_out_and_reported(self, write_lines, tmp_path):
        source = write_lines([{"prompt": "x"}] * 10 + [{"prommpt": "y"}] + [{"prompt": "x"}] * 10)
        responses = write(source, tmp_path / "out")
        assert list(responses.refused) == [f"{source}:11"] and responses.tally.conversations == 20

    def test_a_run_with_other_settings_is_refused_by_their_names(self, prompts, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            write(prompts, tmp_path / "out", interrupted_after(3))
        with pytest.raises(UsageError, match=r"unfinished run with other settings: seed \(0 stored, 1 now\)"):
            write(prompts, tmp_path / "out", seed=1)
        write(prompts, tmp_path / "out")
        with pytest.raises(UsageError, match=r"responses with other settings: top_k \(None stored, 5 now\)"):
            write(prompts, tmp_path / "out", top_k=5)

    def test_finished_conversations_are_not_requested_again(self, prompts, tmp_path, caplog):
        with pytest.raises(KeyboardInterrupt):
            write(prompts, tmp_path / "out", interrupted_after(3))
        asked: list[int] = []

        def recording(prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
            for prompt in prompts:
                asked.append(prompt.index)
                keep([answered(prompt.index)])

        write(prompts, tmp_path / "out", recording)
        assert asked == list(range(3, 20)) and "resuming after 3 conversations" in caplog.text
        write(prompts, tmp_path / "undisturbed")
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")

    @pytest.mark.parametrize(
        "moment", ["pathlib.Path.replace", "shutil.rmtree", "specforge.engines.responses.Responses.to_json"]
    )
    def test_a_kill_during_the_final_steps_loses_nothing(self, prompts, tmp_path, monkeypatch, moment):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            write(prompts, tmp_path / "out")
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        write(prompts, tmp_path / "out", lambda prompts, *_: [pytest.fail("asked again") for _ in prompts])
        write(prompts, tmp_path / "undisturbed")
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.jsonl", "undisturbed"]

    @pytest.mark.parametrize("name", ["out.jsonl", "out.json", ""])
    def test_a_file_name_is_refused(self, prompts, tmp_path, name):
        with pytest.raises(UsageError, match="is not a folder name"):
            write(prompts, Path(name) if not name else tmp_path / name)

    def test_a_folder_with_other_content_is_not_touched(self, prompts, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("all of it")
        with pytest.raises(UsageError, match="holds something else"):
            write(prompts, tmp_path / "out")

    def test_a_second_process_is_refused(self, prompts, tmp_path):
        with locked(tmp_path / "out"), pytest.raises(SpecforgeError, match=r"another process is writing .*out"):
            write(prompts, tmp_path / "out")

    def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_room(self, prompts, tmp_path, capfd):
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
                write(prompts, tmp_path / "out")
            except SpecforgeError as error:
                print(error, flush=True)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        shown = capfd.readouterr().out
        assert "cannot write" in shown and "File too large" in shown and "run the same command again" in shown
        with Journal(tmp_path / ".out.partial" / "journal.jsonl") as journal:
            assert 0 < len(journal.finished) < 20
        write(prompts, tmp_path / "out")
        write(prompts, tmp_path / "undisturbed")
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")


def interrupted_after(number: int) -> Any:
    def answer(prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
        for count, prompt in enumerate(prompts):
            if count == number:
                raise KeyboardInterrupt
            keep([answered(prompt.index)])

    return answer
