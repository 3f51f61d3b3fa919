"""``specforge evaluate --endpoint``: servers of known acceptance, at several loads, by category; faults and errors."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from speculating_server import MODEL, SpeculatingServer, speculating

from specforge.__main__ import main
from specforge.evaluation.results import Results

TOKENS = 12
CODE, MUSIC = 3, 2  # conversations; those of music have two turns


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words)])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"turns": [f"write code {number}"], "category": "coding", "question_id": number} for number in range(CODE)]
    rows += [{"turns": [f"sing {number}", "once more"], "category": "music"} for number in range(MUSIC)]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def servers():
    """Two servers that draft 2 and 4 tokens, and one without speculation."""
    with ExitStack() as running:
        found = [running.enter_context(speculating(drafted)) for drafted in (2, 4, 0)]
        for one in found:
            one.fixed_seconds, one.token_seconds = 0.004, 0.001
        yield found


def rounds(drafted: int, accepts_all: bool) -> list[int]:
    """Return the accepted tokens of each round of a response."""
    found, left = [], TOKENS - 1
    while left:
        found.append(min(drafted if accepts_all or len(found) % 2 == 0 else 0, left - 1))
        left -= found[-1] + 1
    return found


def test_speed_and_acceptance_by_category_and_load(
    servers: list[SpeculatingServer], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two, four, none = servers
    words = ["--endpoint", two.url, f"{four.url}/v1", "--baseline", none.url, "--concurrency", 3, 1]
    words += ["--prompts", prompts, "--max_new_tokens", TOKENS, "--temperature", 0.5, "--top_k", 7]
    assert evaluate(*words, "--output", tmp_path / "out") == 0
    results = Results.read(tmp_path / "out" / "results.json")
    served = results.served
    assert served is not None and served.concurrencies == [1, 3] and results.verifier == MODEL
    assert [one.draft_tokens for one in served.servers] == [2, 4, None]
    for server in served.servers:
        names = [(one.concurrency, one.prompt_set) for one in server.measurements]
        assert names == [(load, name) for load in (1, 3) for name in ("bench coding", "bench music", "all")]
        for one in server.measurements:
            assert one.tokens == TOKENS * one.responses
            assert one.tokens_per_second == pytest.approx(one.tokens / one.seconds)
            assert 0 < one.first_token.p50 <= one.first_token.p99 <= one.whole.p99
            assert one.per_token.p50 <= one.per_token.p90 and one.other_tokens == 0
            assert (one.speedup is None) == server.is_baseline == (one.acceptance_length is None)
        coding, music, both = server.at(3)
        assert [coding.responses, music.responses, both.responses] == [CODE, 2 * MUSIC, CODE + 2 * MUSIC]
        if server.draft_tokens:
            per_category = [rounds(server.draft_tokens, accepts_all) for accepts_all in (True, False)]
            for one, accepted in zip((coding, music), per_category, strict=True):
                assert one.num_drafts == len(accepted) * one.responses
                assert one.acceptance_length == pytest.approx(1 + sum(accepted) / len(accepted))
                reached = [sum(count > position for count in accepted) for position in range(server.draft_tokens)]
                assert one.accept_rate_pos == pytest.approx([count / len(accepted) for count in reached])
            assert both.num_drafts == coding.num_drafts + music.num_drafts
            assert both.acceptance_length == pytest.approx(1 + sum(both.accept_rate_pos))
    for one in servers:
        assert one.most_at_once == 3
        asked = [body for body in one.requests if body["max_tokens"] == TOKENS]
        assert {(body["temperature"], body["top_k"]) for body in asked} == {(0.5, 7)}
        # A prefix that an earlier run has cached would shorten the time to the first token.
        assert len({body["cache_salt"] for body in asked}) == 2 * (CODE + MUSIC)
        assert [len(body["messages"]) for body in asked].count(3) == 2 * MUSIC
    assert [(one.concurrency, len(one.lengths)) for one in served.expectations] == [(1, 4), (3, 4)]
    assert all(one.fitted_to == [2, 4] for one in served.expectations)
    shown = " ".join(capsys.readouterr().out.split())
    assert "At 3 requests at a time: draft" in shown and "bench coding" in shown and "Only one number" not in shown
    page = (tmp_path / "out" / "report.html").read_text()
    assert "bench music" in page and "How many tokens to draft" in page and "No contender" not in page


def test_a_draft_in_process_gives_the_expected_acceptance(
    servers: list[SpeculatingServer],
    draft_folder: Path,
    write_rows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    two, _, none = servers
    sets = write_rows("sums.jsonl", [{"turns": [f"What is {number} and 7?"]} for number in range(2)])
    words = [draft_folder, "--endpoint", two.url, "--baseline", none.url, "--concurrency", 1, "--prompts", sets]
    assert evaluate(*words, "--max_new_tokens", 8, "--baselines", "--output", tmp_path / "out") == 0
    results = Results.read(tmp_path / "out" / "results.json")
    assert results.served is not None
    (expected,) = results.served.expectations
    assert expected.fitted_to == [0, 2]
    assert "Only one number of drafted tokens was measured" in " ".join(capsys.readouterr().out.split())
    replayed = results.contenders[0].all_sets.by_chain_length
    assert [one.acceptance_length for one in expected.lengths] == pytest.approx(replayed)
    measured = results.served.servers[0].measurements[-1]
    assert expected.lengths[1].measured_speedup == pytest.approx(
        measured.request_tokens_per_second / results.served.servers[1].measurements[-1].request_tokens_per_second
    )


def test_tokenised_prompts_a_strict_engine_other_clients_and_a_password(
    servers: list[SpeculatingServer], write_rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = servers[0]
    one.refused_fields, one.strays = {"cache_salt"}, 5
    sets = write_rows("rows.jsonl", [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}] * 2)
    words = ["--endpoint", one.url.replace("//", "//me:sesame@"), "--concurrency", 2, "--prompts", sets]
    assert evaluate(*words, "--max_new_tokens", 4, "--output", tmp_path / "out") == 0
    assert all(body["prompt"] == [5, 6] and "top_k" not in body for body in one.requests)
    # The time of a round at a single K says nothing about others.
    served = Results.read(tmp_path / "out" / "results.json").served
    assert served is not None and not served.expectations and served.servers[0].measurements[0].speedup is None
    shown = " ".join(capsys.readouterr().out.split())
    assert "generated 10 tokens for other clients" in shown
    assert "fewer responses than 2 for each of 2 requests" in shown
    assert "sesame" not in shown + "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def breaking(**changes: object):
    return lambda servers: [setattr(servers[0], name, value) for name, value in changes.items()]


@pytest.mark.parametrize(
    ("change", "words", "status", "message"),
    [
        (None, ["--endpoint", "{closed}"], 1, "is the engine running?"),
        (None, ["--endpoint", "localhost:8000"], 2, "--endpoint: 'localhost:8000' is not the URL of a server"),
        (None, ["--endpoint", "{none}"], 1, "answered without any draft"),
        (None, ["--endpoint", "{two}", "--baseline", "{four}"], 1, "speculates; give a server without a draft"),
        (None, ["--endpoint", "{two}", "{two}/v1"], 2, "is named twice"),
        (None, ["--endpoint", "{two}", "--model", "other"], 2, "does not serve 'other'; it serves served"),
        (None, ["--baseline", "{none}"], 2, "methods without a draft are --baselines"),
        (None, ["--model", "x", "--verifier", "y"], 2, "--model is for servers"),
        (None, ["--endpoint", "{two}", "--concurrency", "0"], 2, "concurrency: must be >0, got 0"),
        (None, ["--endpoint", "{two}", "--output", "{prompts}/out"], 2, "is not a folder that can be written to"),
        (breaking(models=["a", "b"]), ["--endpoint", "{two}"], 2, "--model: choose one"),
        (breaking(metrics="process_cpu_seconds_total 1\n"), ["--endpoint", "{two}"], 1, "vLLM counts nothing with"),
        (breaking(has_usage=False), ["--endpoint", "{two}"], 1, "does not count the tokens"),
        (breaking(broken=['{"choices": [{"delta": {"content": "a"}}]}']), ["--endpoint", "{two}"], 1, "ended a stream"),
        (breaking(broken=['{"choices": 7}']), ["--endpoint", "{two}"], 1, "is malformed: choices"),
        (breaking(broken=['{"error": {"message": "out of memory"}}']), ["--endpoint", "{two}"], 1, "out of memory"),
        (breaking(refused_fields={"seed"}), ["--endpoint", "{two}"], 1, "extra fields ['seed']"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    servers, prompts, tmp_path, capsys, change, words, status, message
) -> None:
    if change is not None:
        change(servers)
    with speculating(2) as closed:
        pass
    urls = {"two": servers[0].url, "four": servers[1].url, "none": servers[2].url, "closed": closed.url}
    words = [word.format(**urls, prompts=prompts) for word in words]
    words += [] if "--concurrency" in words or "--endpoint" not in words else ["--concurrency", "2"]
    more = ["--output", tmp_path / "out", "--prompts", prompts, "--limit", 1, "--max_new_tokens", 4]
    assert evaluate(*more, *words) == status
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1, shown
    assert not (tmp_path / "out").exists()
