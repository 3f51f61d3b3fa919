"""``specforge evaluate``: figures checked against real decoding, baselines, the report, and errors."""

from __future__ import annotations

import json

import pytest
from checkpoint_drafts import break_drafter, make
from quickstart_prompts import QUESTIONS, QUICKSTART, VERIFIER

from specforge.__main__ import main
from specforge.evaluation.results import Results

LIMIT = 6


def evaluate(*words) -> int:
    return main(["evaluate", *map(str, words)])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The first prompts of the quickstart's validation rows, and two conversations of two turns."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = (QUICKSTART / "validation.jsonl").read_text().splitlines()[:LIMIT]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"turns": QUESTIONS[::step]}) + "\n" for step in (1, -1)))
    return [folder / "problems.jsonl", folder / "chats.jsonl"]


@pytest.fixture(scope="module")
def measured(draft_folder, prompts, tmp_path_factory):
    """One evaluation at temperature 0: its output and its results."""
    output = tmp_path_factory.mktemp("evaluation") / "out"
    words = [draft_folder, "--prompts", *prompts, "--proposal", "greedy", "greedy:speculative_tokens=2", "dynamic_tree"]
    words += ["--baselines", "prompt_lookup", "bigram", "--bigram_rows", QUICKSTART / "train.jsonl"]
    assert evaluate(*words, "--max_new_tokens", 40, "--output", output) == 0
    return output, Results.read(output / "results.json")


def by_name(results: Results, part: str):
    return next(contender for contender in results.contenders if part in contender.name)


def test_every_contender_is_measured_on_every_set(measured):
    results = measured[1]
    names = [contender.name for contender in results.contenders]
    assert names == [
        "poor greedy:speculative_tokens=3",
        "poor greedy:speculative_tokens=2",
        "poor dynamic_tree",
        "prompt_lookup",
        "bigram",
    ]
    for contender in results.contenders:
        assert [each.prompt_set for each in contender.sets] == ["problems", "chats"]
        assert [each.responses for each in contender.sets] == [LIMIT, 4]
        assert contender.all_sets.responses == LIMIT + 4
        assert contender.is_baseline == (contender.draft is None) == (contender.name in ("prompt_lookup", "bigram"))


def test_responses_are_the_verifiers_own(measured):
    for contender in measured[1].contenders:
        assert not contender.is_lossy
        assert contender.all_sets.identical_responses == contender.all_sets.responses


def test_figures_agree_with_each_other(measured):
    for contender in measured[1].contenders:
        for each in (*contender.sets, contender.all_sets):
            assert each.acceptance_length == pytest.approx(1 + each.num_accepted_tokens / each.num_drafts)
            assert each.acceptance_length == pytest.approx(1 + sum(each.accept_rate_pos))
            assert each.tokens == each.num_drafts + each.num_accepted_tokens + each.responses
            assert sum(each.histogram) == each.num_drafts
            assert sum(number * count for number, count in enumerate(each.histogram)) == each.num_accepted_tokens
            assert sum(part.drafts for part in each.by_stretch) == each.num_drafts
            low, high = each.confidence_interval
            assert low <= each.acceptance_length <= high
            assert each.speedup == pytest.approx(each.tokens_per_second / each.tokens_per_second_alone)
            assert each.verifier_milliseconds > 0 and each.draft_milliseconds > 0
            assert each.compared_rounds == (each.num_drafts if " greedy" in contender.name else 0)
            assert each.differing_rounds == 0 and not each.difference


def test_figures_by_chain_length_equal_those_of_decoding(measured):
    results = measured[1]
    three, two = by_name(results, "tokens=3").all_sets, by_name(results, "tokens=2").all_sets
    assert three.by_chain_length == two.by_chain_length
    assert three.by_chain_length[2] == pytest.approx(three.acceptance_length)
    assert three.by_chain_length[1] == pytest.approx(two.acceptance_length)
    lookup = by_name(results, "prompt_lookup").all_sets
    assert lookup.by_chain_length[4] == pytest.approx(lookup.acceptance_length)


def test_a_draft_that_a_baseline_beats_is_reported_everywhere(measured, capsys):
    output, results = measured
    assert set(results.beaten_by_baselines()) >= {"poor greedy:speculative_tokens=3"}
    page = (output / "report.html").read_text()
    assert "does not beat" in page


def test_prints_a_table_and_the_path_of_the_report(draft_folder, prompts, tmp_path, capsys):
    words = [
        "--prompts",
        prompts[0],
        "--limit",
        2,
        "--max_new_tokens",
        10,
        "--batch_size",
        2,
        "--output",
        tmp_path / "out",
    ]
    assert evaluate(draft_folder, *words) == 0
    shown = capsys.readouterr().out
    assert "Mean acceptance length" in shown and "Per-position acceptance rate" in shown
    assert "does not beat" in " ".join(shown.split()) and f"{tmp_path / 'out'} holds" in shown


def test_above_temperature_zero_the_draft_samples_and_nothing_is_compared(draft_folder, prompts, tmp_path):
    words = ["--prompts", *prompts, "--proposal", "sampling", "--verification", "block", "--baselines"]
    words += ["--temperature", 1, "--max_new_tokens", 12, "--output", tmp_path / "out"]
    assert evaluate(draft_folder, *words) == 0
    results = Results.read(tmp_path / "out" / "results.json")
    assert [contender.name for contender in results.contenders] == ["poor sampling"]
    measurement = results.contenders[0].all_sets
    assert measurement.identical_responses is None and measurement.acceptance_length >= 1
    assert len(measurement.by_chain_length) == 8 and not results.contenders[0].is_lossy


def test_a_drafter_that_differs_from_training_is_reported(prompts, tmp_path, monkeypatch, capsys):
    draft = make("eagle")
    draft.save_pretrained(tmp_path / "draft")
    break_drafter(draft, monkeypatch)
    words = ["--prompts", *prompts, "--max_new_tokens", 40, "--batch_size", 4, "--baselines", "--output"]
    assert evaluate(tmp_path / "draft", *words, tmp_path / "out") == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = Results.read(tmp_path / "out" / "results.json").contenders[0].all_sets
    assert 0 < found.differing_rounds <= found.compared_rounds == found.num_drafts
    # The text is the verifier's own with any draft.
    assert found.identical_responses == found.responses
    assert "WARNING" in shown and "real decoding accepts different tokens than replay" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["prompts", "required"]),
        (["--prompts", "empty.jsonl"], ["empty.jsonl is empty"]),
        (["--prompts", "blank.jsonl"], ["blank.jsonl holds no prompts"]),
        (["--prompts", "broken.jsonl"], ["broken.jsonl:2", "invalid JSON"]),
        (["--prompts", "other.jsonl"], ["other.jsonl:1", "a row without a prompt", "'turns'"]),
        (["--prompts", "good.jsonl", "good.jsonl"], ["two prompt sets have the same name"]),
        (["--prompts", "good.jsonl", "--baselines", "greedy"], ["--baselines: greedy needs a draft"]),
        (["--prompts", "good.jsonl", "--baselines", "bigram"], ["--bigram_rows"]),
        (
            ["--prompts", "good.jsonl", "--baselines", "bigram", "--bigram_rows", "none.jsonl"],
            ["--bigram_rows: none.jsonl"],
        ),
        (["--prompts", "good.jsonl", "--proposal", "greedy", "greedy"], ["two contenders have the same name"]),
        (["--prompts", "good.jsonl", "--limit", "0"], ["limit"]),
    ],
)
def test_errors_are_one_line(draft_folder, write_rows, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    write_rows("good.jsonl", [{"turns": ["Hi"]}])
    write_rows("other.jsonl", [{"question": "Hi"}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "broken.jsonl").write_text('{"turns": ["Hi"]}\n{"turns": ')
    assert evaluate(draft_folder, *words) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("specforge evaluate: error: ")
    assert all(part in message for part in expected), message


def test_nothing_to_measure_is_rejected(capsys):
    assert evaluate("--verifier", VERIFIER, "--prompts", "x.jsonl", "--baselines") == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused(draft_folder, prompts, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--prompts", prompts[0], "--limit", 1, "--max_new_tokens", 4, "--output", tmp_path / "file"]
    assert evaluate(draft_folder, *words) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_flags_may_be_in_a_file(draft_folder, prompts, tmp_path):
    config = QUICKSTART.parent / "eagle-evaluation.yaml"
    words = ["--config", config, "--prompts", prompts[0], "--limit", 1, "--max_new_tokens", 4]
    assert evaluate(draft_folder, *words, "--output", tmp_path / "out") == 0
    results = Results.read(tmp_path / "out" / "results.json")
    assert [contender.proposal["proposal_type"] for contender in results.contenders] == [
        "greedy",
        "dynamic_tree",
        "prompt_lookup",
    ]
    assert results.max_new_tokens == 4


def test_a_wrong_key_in_a_file_is_named_with_its_line(draft_folder, tmp_path, capsys):
    config = tmp_path / "wrong.yaml"
    config.write_text("max_new_tokens: 4\nbigram_row: train.jsonl\n")
    assert evaluate(draft_folder, "--config", config, "--prompts", "x.jsonl") == 2
    message = capsys.readouterr().err
    assert "'bigram_row'" in message and f"{config}:2" in message and "Did you mean 'bigram_rows'" in message
