"""Answers through endpoints: what is sent and read, and what becomes of a run when an engine is at fault."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_in import MODEL, StandIn, prompt_ids, reply_ids, serving

from specforge.engines.answering import EndpointAnswerer, EndpointSettings
from specforge.engines.asking import Asking
from specforge.engines.journal import Journal
from specforge.engines.responses import Responses, write_responses
from specforge.errors import SpecforgeError, UsageError
from specforge.sampling import Sampling

WARM = Asking(Sampling(temperature=0.7, top_k=20, top_p=0.9), 32, seed=5)
GREEDY = Asking(Sampling(), 32, seed=5)


@pytest.fixture
def engine() -> Iterator[StandIn]:
    with serving() as started:
        yield started


@pytest.fixture
def other() -> Iterator[StandIn]:
    with serving() as started:
        yield started


@pytest.fixture
def prompts(write_lines) -> str:
    return write_lines([{"turns": [f"ask {number}", "and then?"][: 1 + number % 2]} for number in range(30)], "p.jsonl")


def write(source: str, output: Path, *engines: StandIn | str, asking: Asking = WARM, **settings: Any) -> Responses:
    urls = [one if isinstance(one, str) else one.url for one in engines]
    answerer = EndpointAnswerer(EndpointSettings(urls, **{"retries": 0, "timeout": 5.0, **settings}), asking)
    model = answerer.model
    return write_responses([source], None, {"model": model}, output, answerer.answer, lambda journal: ({}, {}))


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]


def asked(body: dict[str, Any]) -> int:
    """Number of the prompt that a request is about."""
    return int(body["messages"][0]["content"].split()[1])


class TestAnswers:
    def test_rows_hold_the_tokens_that_the_engine_returns(self, engine, prompts, tmp_path):
        responses = write(prompts, tmp_path / "out", engine)
        rows = read(tmp_path / "out")
        assert [int(row["messages"][0]["content"].split()[1]) for row in rows] == list(range(30))
        for index, row in enumerate(rows):
            chat: list[dict[str, str]] = []
            ids: list[int] = []
            supervised: list[int] = []
            for turn, message in enumerate(row["messages"][::2]):
                chat.append(message)
                said = reply_ids({"messages": chat, "seed": WARM.seed_of(index, turn)})
                ids = prompt_ids(chat) + said
                supervised += said
                chat.append({"role": "assistant", "content": " ".join(map(str, said[:-1]))})
            assert row["messages"] == chat and row["input_ids"] == ids
            masked = [token for token, is_own in zip(ids, row["loss_mask"], strict=True) if is_own]
            assert masked == supervised
        assert responses.tally.with_tokens == 30 and responses.tally.replies == 45

    def test_what_is_asked_overrides_the_defaults_of_the_engine(self, engine, prompts, tmp_path):
        thinking = Asking(WARM.sampling, 32, 5, {"enable_thinking": False})
        write(prompts, tmp_path / "out", engine, asking=thinking)
        body = next(one for one in engine.requests if asked(one) == 3 and len(one["messages"]) == 1)
        expected = {"model": MODEL, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 32}
        expected |= {"min_p": 0.0, "repetition_penalty": 1.0, "seed": WARM.seed_of(3, 0), "return_token_ids": True}
        expected |= {"chat_template_kwargs": {"enable_thinking": False}}
        assert body == {**body, **expected}

    def test_all_tokens_are_asked_for_where_top_k_is_not_set(self, engine, prompts, tmp_path):
        write(prompts, tmp_path / "out", engine, asking=GREEDY)
        assert {body["top_k"] for body in engine.requests} == {-1}

    def test_many_are_in_flight(self, engine, prompts, tmp_path):
        engine.delay = 0.2
        write(prompts, tmp_path / "out", engine, concurrency=10)
        assert engine.most_at_once == 10

    def test_several_engines_share_the_work(self, engine, other, prompts, tmp_path):
        engine.delay = other.delay = 0.05
        write(prompts, tmp_path / "out", engine, other, concurrency=6)
        assert len(engine.requests) + len(other.requests) == 45
        assert min(len(engine.requests), len(other.requests)) > 10

    def test_the_key_comes_from_the_environment(self, engine, prompts, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "sesame")
        write(prompts, tmp_path / "out", engine)
        assert engine.keys == {"Bearer sesame"}

    def test_the_only_model_is_found(self, engine, other, prompts, tmp_path):
        other.models = [MODEL, "another"]
        with pytest.raises(UsageError, match=r"--model: which one\? the endpoints serve another, stand-in"):
            write(prompts, tmp_path / "out", engine, other)
        write(prompts, tmp_path / "out", engine, other, model=MODEL)


class TestWithoutTokenIds:
    def test_messages_alone_are_written(self, engine, prompts, tmp_path):
        engine.token_ids = False
        responses = write(prompts, tmp_path / "out", engine)
        assert all(set(row) == {"origin", "messages"} for row in read(tmp_path / "out"))
        assert responses.tally.with_tokens == 0 and responses.tally.tokens == 45 * 4

    def test_an_engine_that_takes_only_openais_fields_is_asked_for_no_more(self, engine, prompts, tmp_path, caplog):
        engine.refused_fields = {"top_k", "return_token_ids", "min_p", "repetition_penalty"}
        write(prompts, tmp_path / "out", engine, asking=GREEDY)
        assert engine.probes == 2 and len(read(tmp_path / "out")) == 30
        assert "takes no fields beyond OpenAI's own" in caplog.text

    def test_an_engine_that_does_not_take_top_k_will_not_do_where_it_is_set(self, engine, prompts, tmp_path):
        engine.refused_fields = {"top_k"}
        with pytest.raises(SpecforgeError, match=r"Unexpected fields .*top_k.*; --top_k needs one that takes it"):
            write(prompts, tmp_path / "out", engine)

    def test_replies_that_were_cut_are_left_out(self, engine, prompts, tmp_path):
        engine.finish = "length"
        assert write(prompts, tmp_path / "tokens", engine).tally.finishes["length"] == 45
        engine.token_ids = False
        with pytest.raises(SpecforgeError, match=r"none of the 30 .*the reply ended by length: .*--max_new_tokens"):
            write(prompts, tmp_path / "text", engine)

    def test_prompts_of_tokens_are_left_out(self, engine, write_lines, tmp_path):
        source = write_lines([{"input_ids": [1, 2], "loss_mask": [0, 1]}, {"prompt": "ask 1"}])
        (reason,) = write(source, tmp_path / "out", engine).refused.values()
        assert "holds tokens alone" in reason


class TestFaults:
    @pytest.mark.parametrize(
        ("status", "told"),
        [
            (401, "refuses the API key .fault 401.; put the right one into OPENAI_API_KEY"),
            (403, "refuses the API key"),
            (404, "not found .fault 404.; check --model"),
        ],
    )
    def test_what_would_fail_every_request_is_told_at_once(self, engine, prompts, tmp_path, status, told):
        engine.fault = lambda body: status
        with pytest.raises(SpecforgeError, match=told) as error:
            write(prompts, tmp_path / "out", engine, retries=3)
        assert error.value.exit_status == 1 and engine.probes == 1 and not engine.requests
        assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]

    def test_a_wrong_model_is_told_at_once(self, engine, prompts, tmp_path):
        with pytest.raises(SpecforgeError, match=r"The model `nope` does not exist.*check --model"):
            write(prompts, tmp_path / "out", engine, model="nope")
        assert engine.probes == 1 and not engine.requests

    @pytest.mark.parametrize("model", [None, MODEL])
    def test_nobody_there_is_told(self, prompts, tmp_path, model):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(SpecforgeError, match=r"no connection .*is the engine running\?"):
            write(prompts, tmp_path / "out", url, model=model)

    def test_a_passing_fault_is_tried_again(self, engine, prompts, tmp_path):
        faults = {4: 500, 5: 429, 6: 0}
        engine.fault = lambda body: faults.pop(asked(body), None) if body["max_tokens"] > 1 else None
        write(prompts, tmp_path / "out", engine, retries=2)
        assert not faults and len(read(tmp_path / "out")) == 30
        write(prompts, tmp_path / "undisturbed", engine)
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")

    @pytest.mark.parametrize("status", [500, 0])
    def test_a_dying_engine_stops_the_run_and_what_is_answered_is_kept(self, engine, prompts, tmp_path, status):
        engine.fault = lambda body: status if len(engine.requests) > 20 else None
        with pytest.raises(SpecforgeError, match=r"3 requests in a row have failed.*what is answered is kept") as error:
            write(prompts, tmp_path / "out", engine, max_failures=3, concurrency=2)
        assert error.value.exit_status == 1 and not (tmp_path / "out").exists()
        with Journal(tmp_path / ".out.partial" / "journal.jsonl") as journal:
            kept = len(journal.finished)
        assert kept >= 12
        engine.fault = lambda body: None
        engine.requests.clear()
        write(prompts, tmp_path / "out", engine)
        assert len({asked(body) for body in engine.requests}) == 30 - kept
        write(prompts, tmp_path / "undisturbed", engine)
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")

    def test_an_engine_that_does_not_answer_in_time_has_failed(self, engine, prompts, tmp_path):
        engine.delay = 1.0
        with pytest.raises(SpecforgeError, match="no answer in time; raise --timeout"):
            write(prompts, tmp_path / "out", engine, timeout=0.2, max_failures=2)

    def test_one_request_that_always_fails_is_missing_and_the_same_command_asks_again(self, engine, prompts, tmp_path):
        engine.fault = lambda body: 500 if asked_or_none(body) == 7 else None
        with pytest.raises(
            SpecforgeError, match=r"1 conversations were not answered, the first one .*p.jsonl:8: status 500"
        ):
            write(prompts, tmp_path / "out", engine)
        engine.fault = lambda body: None
        engine.requests.clear()
        write(prompts, tmp_path / "out", engine)
        assert {asked(body) for body in engine.requests} == {7}
        assert len(read(tmp_path / "out")) == 30

    def test_a_request_that_is_refused_is_left_out(self, engine, prompts, tmp_path):
        engine.fault = lambda body: 400 if asked_or_none(body) == 7 else None
        responses = write(prompts, tmp_path / "out", engine)
        assert responses.refused == {f"{prompts}:8": "fault 400"} and len(read(tmp_path / "out")) == 29

    def test_where_one_of_several_engines_dies_the_others_go_on(self, engine, other, prompts, tmp_path, caplog):
        other.fault = lambda body: 500 if len(other.requests) > 3 else None
        write(prompts, tmp_path / "out", engine, other, max_failures=3, concurrency=4)
        assert len(read(tmp_path / "out")) == 30
        assert f"{other.url} is left out: 3 requests in a row have failed" in caplog.text

    def test_a_key_that_runs_out_stops_the_run(self, engine, prompts, tmp_path):
        engine.fault = lambda body: 401 if len(engine.requests) > 10 else None
        with pytest.raises(SpecforgeError, match="refuses the API key"):
            write(prompts, tmp_path / "out", engine, concurrency=2)
        assert (tmp_path / ".out.partial" / "journal.jsonl").stat().st_size > 0


def asked_or_none(body: dict[str, Any]) -> int | None:
    return asked(body) if body["max_tokens"] > 1 else None


def good(**of_the_choice: Any) -> dict[str, Any]:
    """An answer of vLLM's, with something changed in its choice."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "4 5"},
        "token_ids": [4, 5],
    }
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL, "prompt_token_ids": [1, 3]}
    return {**answer, "choices": [{**choice, **of_the_choice}]}


WRONG = {
    "a page": b"<html>starting</html>",
    "nothing": b"",
    "null": b"null",
    "no choice": json.dumps({**good(), "choices": []}).encode(),
    "half a surrogate": json.dumps(good(message={"role": "assistant", "content": "\ud800"})).encode(),
    "a number for a text": json.dumps(good(message={"role": "assistant", "content": 4})).encode(),
    "no reason": json.dumps(good(finish_reason=None)).encode(),
    "no tokens": json.dumps(good(token_ids=[])).encode(),
    "tokens as text": json.dumps(good(token_ids=["4"])).encode(),
    "tokens below 0": json.dumps(good(token_ids=[-1])).encode(),
    "tokens beyond the vocabulary": json.dumps(good(token_ids=[500])).encode(),
}


def only_prompts(wrong: bytes) -> Any:
    """Answer the probe rightly, and all prompts wrongly."""
    return lambda body: wrong if body["max_tokens"] > 1 else None


class TestWrongAnswers:
    @pytest.mark.parametrize("name", WRONG)
    def test_a_wrong_shape_is_a_failed_request(self, engine, prompts, tmp_path, name):
        engine.raw = only_prompts(WRONG[name])
        with pytest.raises(
            SpecforgeError, match=r"2 requests in a row have failed.*not one of chat completions"
        ) as error:
            write(prompts, tmp_path / "out", engine, max_failures=2, concurrency=1, vocabulary=400)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists() and len(engine.requests) == 2

    def test_it_is_tried_again(self, engine, prompts, tmp_path):
        wrong = iter([b"<html>starting</html>", b"null"])
        engine.raw = lambda body: next(wrong, None) if body["max_tokens"] > 1 else None
        write(prompts, tmp_path / "out", engine, retries=2, concurrency=1)
        write(prompts, tmp_path / "undisturbed", engine)
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")

    def test_an_answer_that_drips_is_not_waited_for(self, engine, prompts, tmp_path):
        engine.drips = True
        try:
            with pytest.raises(SpecforgeError, match="no answer in time; raise --timeout"):
                write(prompts, tmp_path / "out", engine, timeout=0.2, model=MODEL)
        finally:
            engine.drips = False

    def test_an_answer_without_end_is_not_read_on(self, engine, prompts, tmp_path, monkeypatch):
        monkeypatch.setattr("specforge.engines.connection.LONGEST", 10)
        with pytest.raises(SpecforgeError, match="the answer is longer than"):
            write(prompts, tmp_path / "out", engine, model=MODEL)


class TestAddresses:
    def test_a_password_is_sent_and_never_shown(self, engine, prompts, tmp_path, caplog):
        url = engine.url.replace("//", "//me:sesame@")
        write(prompts, tmp_path / "out", url)
        assert engine.keys == {f"Basic {base64.b64encode(b'me:sesame').decode()}"}
        engine.fault = lambda body: 500
        with pytest.raises(SpecforgeError) as error:
            write(prompts, tmp_path / "failed", url, max_failures=1)
        assert engine.url in str(error.value)
        written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
        assert "sesame" not in f"{error.value}{caplog.text}{written}"

    @pytest.mark.parametrize(
        "url",
        ["localhost:8000/v1", "http://me:sesame@/v1", "http://[::1", "http://h:port/v1?key=sesame", "", "\x1b[31m"],
    )
    def test_what_is_no_address_is_refused(self, prompts, tmp_path, url):
        with pytest.raises(UsageError, match=r"--endpoint: .* is no address of a server") as error:
            write(prompts, tmp_path / "out", url)
        assert "sesame" not in str(error.value) and str(error.value).isprintable()

    def test_a_key_that_no_header_holds_is_refused(self, engine, prompts, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
        with pytest.raises(UsageError, match="OPENAI_API_KEY"):
            write(prompts, tmp_path / "out", engine)


class TestKilled:
    def test_again_and_again_the_rows_are_those_of_an_undisturbed_run(self, engine, write_lines, tmp_path):
        source = write_lines([{"turns": [f"ask {number}", "and then?"]} for number in range(200)], "many.jsonl")
        chance = random.Random(8)
        engine.delay = 0.03
        journal = tmp_path / ".out.partial" / "journal.jsonl"
        for _ in range(10):
            size = journal.stat().st_size if journal.exists() else 0
            child = os.fork()
            if child == 0:
                try:
                    write(source, tmp_path / "out", engine, model=MODEL, concurrency=4)
                finally:
                    os._exit(1)
            while not journal.exists() or journal.stat().st_size <= size:
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended by itself"
                time.sleep(0.002)
            time.sleep(chance.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        engine.delay = 0.0
        requests = len(engine.requests)
        write(source, tmp_path / "out", engine, model=MODEL)
        # Of each run that was killed, no more is lost than what was in flight: four conversations of two turns.
        assert requests <= len(engine.requests) <= 2 * 200 + 10 * 4 * 2
        write(source, tmp_path / "undisturbed", engine, model=MODEL)
        assert (tmp_path / "out" / "responses.jsonl").read_bytes() == (
            tmp_path / "undisturbed" / "responses.jsonl"
        ).read_bytes()
