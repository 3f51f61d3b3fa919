"""Answers through endpoints: requests, responses, and the effect of engine faults on a run."""

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
from loopback import QuietHandler, listening
from stand_in import MODEL, StandIn, prompt_ids, reply_ids, serving

from specforge.engines.answering import EndpointAnswerer
from specforge.engines.generation import GenerationSettings
from specforge.engines.journal import Journal
from specforge.engines.pool import EndpointSettings
from specforge.engines.responses import Responses, write_responses
from specforge.errors import SpecforgeError, UsageError
from specforge.sampling import Sampling

WARM = GenerationSettings(Sampling(temperature=0.7, top_k=20, top_p=0.9), 32, seed=5)
GREEDY = GenerationSettings(Sampling(), 32, seed=5)


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


def write(
    source: str, output: Path, *engines: StandIn | str, generation: GenerationSettings = WARM, **settings: Any
) -> Responses:
    urls = [each if isinstance(each, str) else each.url for each in engines]
    answerer = EndpointAnswerer(EndpointSettings(urls, **{"retries": 0, "timeout": 5.0, **settings}), generation)
    model = answerer.model
    return write_responses([source], None, {"model": model}, output, answerer.answer, lambda journal: ({}, {}))


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]


def prompt_index(body: dict[str, Any]) -> int:
    """Return the index of the prompt of a request."""
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
                generated = reply_ids({"messages": chat, "seed": WARM.seed_of(index, turn)})
                ids = prompt_ids(chat) + generated
                supervised += generated
                chat.append({"role": "assistant", "content": " ".join(map(str, generated[:-1]))})
            assert row["messages"] == chat and row["input_ids"] == ids
            masked = [token for token, is_own in zip(ids, row["loss_mask"], strict=True) if is_own]
            assert masked == supervised
        assert responses.tally.with_tokens == 30 and responses.tally.replies == 45

    def test_requests_override_the_defaults_of_the_engine(self, engine, prompts, tmp_path):
        thinking = GenerationSettings(WARM.sampling, 32, 5, {"enable_thinking": False})
        write(prompts, tmp_path / "out", engine, generation=thinking)
        body = next(
            request for request in engine.requests if prompt_index(request) == 3 and len(request["messages"]) == 1
        )
        expected = {"model": MODEL, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 32}
        expected |= {"min_p": 0.0, "repetition_penalty": 1.0, "seed": WARM.seed_of(3, 0), "return_token_ids": True}
        expected |= {"chat_template_kwargs": {"enable_thinking": False}}
        assert body == {**body, **expected}

    def test_top_k_is_all_tokens_by_default(self, engine, prompts, tmp_path):
        write(prompts, tmp_path / "out", engine, generation=GREEDY)
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
        with pytest.raises(UsageError, match=r"--model: choose one, the endpoints serve another, stand-in"):
            write(prompts, tmp_path / "out", engine, other)
        write(prompts, tmp_path / "out", engine, other, model=MODEL)


class TestWithoutTokenIds:
    def test_only_messages_are_written(self, engine, prompts, tmp_path):
        engine.token_ids = False
        responses = write(prompts, tmp_path / "out", engine)
        assert all(set(row) == {"origin", "messages"} for row in read(tmp_path / "out"))
        assert responses.tally.with_tokens == 0 and responses.tally.tokens == 45 * 4

    def test_an_engine_with_only_openais_fields_gets_no_others(self, engine, prompts, tmp_path, caplog):
        engine.refused_fields = {"top_k", "return_token_ids", "min_p", "repetition_penalty"}
        write(prompts, tmp_path / "out", engine, generation=GREEDY)
        assert engine.probes == 2 and len(read(tmp_path / "out")) == 30
        assert "accepts only OpenAI's own fields" in caplog.text

    def test_an_engine_without_top_k_is_refused_if_it_is_set(self, engine, prompts, tmp_path):
        engine.refused_fields = {"top_k"}
        with pytest.raises(
            SpecforgeError, match=r"Unexpected fields .*top_k.*; --top_k needs an engine that accepts it"
        ):
            write(prompts, tmp_path / "out", engine)

    def test_truncated_replies_are_left_out(self, engine, prompts, tmp_path):
        engine.finish = "length"
        assert write(prompts, tmp_path / "tokens", engine).tally.finishes["length"] == 45
        engine.token_ids = False
        with pytest.raises(SpecforgeError, match=r"none of the 30 .*the reply ended by length: .*--max_new_tokens"):
            write(prompts, tmp_path / "text", engine)

    def test_tokenised_prompts_are_left_out(self, engine, write_lines, tmp_path):
        source = write_lines([{"input_ids": [1, 2], "loss_mask": [0, 1]}, {"prompt": "ask 1"}])
        (reason,) = write(source, tmp_path / "out", engine).refused.values()
        assert "holds only tokens" in reason


class TestFaults:
    @pytest.mark.parametrize(
        ("status", "message"),
        [
            (401, "refuses the API key .fault 401.; set the right one in OPENAI_API_KEY"),
            (403, "refuses the API key"),
            (404, "not found .fault 404.; check --model"),
        ],
    )
    def test_a_fault_of_every_request_is_reported_at_once(self, engine, prompts, tmp_path, status, message):
        engine.fault = lambda body: status
        with pytest.raises(SpecforgeError, match=message) as error:
            write(prompts, tmp_path / "out", engine, retries=3)
        assert error.value.exit_status == 1 and engine.probes == 1 and not engine.requests
        assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]

    def test_a_wrong_model_is_reported_at_once(self, engine, prompts, tmp_path):
        with pytest.raises(SpecforgeError, match=r"The model `nope` does not exist.*check --model"):
            write(prompts, tmp_path / "out", engine, model="nope")
        assert engine.probes == 1 and not engine.requests

    @pytest.mark.parametrize("model", [None, MODEL])
    def test_a_missing_server_is_reported(self, prompts, tmp_path, model):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(SpecforgeError, match=r"no connection .*is the engine running\?"):
            write(prompts, tmp_path / "out", url, model=model)

    def test_a_web_server_is_reported_without_its_page(self, prompts, tmp_path):
        class WebServer(QuietHandler):
            def do_GET(self) -> None:
                self.send_error(404)

        with listening(WebServer) as url, pytest.raises(SpecforgeError, match=r"not found .the answer is a web page.;"):
            write(prompts, tmp_path / "out", url)

    def test_a_temporary_fault_is_retried(self, engine, prompts, tmp_path):
        faults = {4: 500, 5: 429, 6: 0}
        engine.fault = lambda body: faults.pop(prompt_index(body), None) if body["max_tokens"] > 1 else None
        write(prompts, tmp_path / "out", engine, retries=2)
        assert not faults and len(read(tmp_path / "out")) == 30
        write(prompts, tmp_path / "undisturbed", engine)
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")

    @pytest.mark.parametrize("status", [500, 0])
    def test_a_dying_engine_stops_the_run_and_finished_conversations_are_kept(self, engine, prompts, tmp_path, status):
        engine.fault = lambda body: status if len(engine.requests) > 20 else None
        with pytest.raises(
            SpecforgeError, match=r"3 requests in a row have failed.*finished conversations are kept"
        ) as error:
            write(prompts, tmp_path / "out", engine, max_failures=3, concurrency=2)
        assert error.value.exit_status == 1 and not (tmp_path / "out").exists()
        with Journal(tmp_path / ".out.partial" / "journal.jsonl") as journal:
            kept = len(journal.finished)
        assert kept >= 12
        engine.fault = lambda body: None
        engine.requests.clear()
        write(prompts, tmp_path / "out", engine)
        assert len({prompt_index(body) for body in engine.requests}) == 30 - kept
        write(prompts, tmp_path / "undisturbed", engine)
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")

    def test_an_engine_that_exceeds_the_timeout_has_failed(self, engine, prompts, tmp_path):
        engine.delay = 1.0
        with pytest.raises(SpecforgeError, match="no response in time; raise --timeout"):
            write(prompts, tmp_path / "out", engine, timeout=0.2, max_failures=2)

    def test_a_failing_request_is_repeated_by_the_same_command(self, engine, prompts, tmp_path):
        engine.fault = lambda body: 500 if prompt_index_or_none(body) == 7 else None
        with pytest.raises(
            SpecforgeError, match=r"1 conversations were not answered, the first: .*p.jsonl:8: status 500"
        ):
            write(prompts, tmp_path / "out", engine)
        engine.fault = lambda body: None
        engine.requests.clear()
        write(prompts, tmp_path / "out", engine)
        assert {prompt_index(body) for body in engine.requests} == {7}
        assert len(read(tmp_path / "out")) == 30

    def test_a_refused_request_is_left_out(self, engine, prompts, tmp_path):
        engine.fault = lambda body: 400 if prompt_index_or_none(body) == 7 else None
        responses = write(prompts, tmp_path / "out", engine)
        assert responses.refused == {f"{prompts}:8": "fault 400"} and len(read(tmp_path / "out")) == 29

    def test_if_one_of_several_engines_dies_the_others_continue(self, engine, other, prompts, tmp_path, caplog):
        other.fault = lambda body: 500 if len(other.requests) > 3 else None
        write(prompts, tmp_path / "out", engine, other, max_failures=3, concurrency=4)
        assert len(read(tmp_path / "out")) == 30
        assert f"{other.url} is dropped: 3 requests in a row have failed" in caplog.text

    def test_an_expired_key_stops_the_run(self, engine, prompts, tmp_path):
        engine.fault = lambda body: 401 if len(engine.requests) > 10 else None
        with pytest.raises(SpecforgeError, match="refuses the API key"):
            write(prompts, tmp_path / "out", engine, concurrency=2)
        assert (tmp_path / ".out.partial" / "journal.jsonl").stat().st_size > 0


def prompt_index_or_none(body: dict[str, Any]) -> int | None:
    return prompt_index(body) if body["max_tokens"] > 1 else None


def good(**changes: Any) -> dict[str, Any]:
    """Return a response as vLLM's, with changes in its choice."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "4 5"},
        "token_ids": [4, 5],
    }
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL, "prompt_token_ids": [1, 3]}
    return {**answer, "choices": [{**choice, **changes}]}


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
    """Answer the probe correctly and all prompts with a wrong body."""
    return lambda body: wrong if body["max_tokens"] > 1 else None


class TestWrongAnswers:
    @pytest.mark.parametrize("name", WRONG)
    def test_a_malformed_response_is_a_failed_request(self, engine, prompts, tmp_path, name):
        engine.raw = only_prompts(WRONG[name])
        with pytest.raises(SpecforgeError, match=r"2 requests in a row have failed.*is not a chat completion") as error:
            write(prompts, tmp_path / "out", engine, max_failures=2, concurrency=1, vocabulary=400)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists() and len(engine.requests) == 2

    def test_it_is_retried(self, engine, prompts, tmp_path):
        wrong = iter([b"<html>starting</html>", b"null"])
        engine.raw = lambda body: next(wrong, None) if body["max_tokens"] > 1 else None
        write(prompts, tmp_path / "out", engine, retries=2, concurrency=1)
        write(prompts, tmp_path / "undisturbed", engine)
        assert read(tmp_path / "out") == read(tmp_path / "undisturbed")

    def test_a_response_sent_byte_by_byte_times_out(self, engine, prompts, tmp_path):
        engine.drips = True
        try:
            with pytest.raises(SpecforgeError, match="no response in time; raise --timeout"):
                write(prompts, tmp_path / "out", engine, timeout=0.2, model=MODEL)
        finally:
            engine.drips = False

    def test_an_endless_response_is_not_read_further(self, engine, prompts, tmp_path, monkeypatch):
        monkeypatch.setattr("specforge.engines.connection.LONGEST", 10)
        with pytest.raises(SpecforgeError, match="the response is longer than"):
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
    def test_an_invalid_url_is_refused(self, prompts, tmp_path, url):
        with pytest.raises(UsageError, match=r"--endpoint: .* is not the URL of a server") as error:
            write(prompts, tmp_path / "out", url)
        assert "sesame" not in str(error.value) and str(error.value).isprintable()

    def test_a_key_that_is_not_a_valid_header_is_refused(self, engine, prompts, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
        with pytest.raises(UsageError, match="OPENAI_API_KEY"):
            write(prompts, tmp_path / "out", engine)


class TestKilled:
    def test_a_run_killed_repeatedly_gives_the_rows_of_an_undisturbed_run(self, engine, write_lines, tmp_path):
        source = write_lines([{"turns": [f"ask {number}", "and then?"]} for number in range(200)], "many.jsonl")
        generator = random.Random(8)
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
            time.sleep(generator.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        engine.delay = 0.0
        requests = len(engine.requests)
        write(source, tmp_path / "out", engine, model=MODEL)
        # Each killed run loses at most what was in flight: four conversations of two turns.
        assert requests <= len(engine.requests) <= 2 * 200 + 10 * 4 * 2
        write(source, tmp_path / "undisturbed", engine, model=MODEL)
        assert (tmp_path / "out" / "responses.jsonl").read_bytes() == (
            tmp_path / "undisturbed" / "responses.jsonl"
        ).read_bytes()
