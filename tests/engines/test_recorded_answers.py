"""Answers and their states in one pass: what is stored, and that faults and interruptions lose neither."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extracting_server import ExtractingServer
from transformers import AutoTokenizer, PreTrainedModel

from specforge.__main__ import main
from specforge.data.features.store import FeatureStore
from specforge.data.rows.reading import row_digest
from specforge.verifier.features import capture

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
VERIFIER = CONFIG.parent / "quickstart" / "verifier"
LAYERS = [2, 4, 5, 8]
PROMPTS = 8


@pytest.fixture
def server(model, tmp_path) -> Iterator[ExtractingServer]:
    (tmp_path / "shared").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    with ExtractingServer(model, LAYERS, tmp_path / "shared", tokenizer) as started:
        yield started


@pytest.fixture
def record(server, tmp_path, monkeypatch) -> Callable[..., int]:
    """Answer prompts of one and two turns into a folder, and record."""
    monkeypatch.setattr("specforge.engines.pool.REST_SECONDS", 0.05)
    prompts = tmp_path / "prompts.jsonl"
    turns = ([f"What is {number} + {number}?", "And then?"][: 1 + number % 2] for number in range(PROMPTS))
    prompts.write_text("".join(json.dumps({"turns": one}) + "\n" for one in turns))
    config = tmp_path / "fit.yaml"
    config.write_text(CONFIG.read_text().replace("configs/quickstart/verifier", str(VERIFIER)))

    def run(name: str, *more: str) -> int:
        words = ["prepare", "responses", str(prompts), "--output", str(tmp_path / name), "--record", str(config)]
        words += ["--endpoint", server.url, "--max_new_tokens", "6", "--retries", "1", "--concurrency", "3"]
        return main([*words, *more])

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def check_states(folder: Path, model: PreTrainedModel) -> None:
    """Compare the stored states of all rows with our own capture."""
    store = FeatureStore(folder / "features")
    for row in rows(folder):
        ids = np.array(row["input_ids"])
        (index,) = store.locate(np.frombuffer(row_digest(ids), np.uint64)[None])
        kept = int(store.kept[index])
        assert index >= 0 and kept in (len(ids) - 1, len(ids)), "of all tokens, perhaps without the last"
        own = capture(model, torch.from_numpy(ids)[None], torch.arange(len(ids))[None], LAYERS[:-1])
        expected = [*own.aux[0].unbind(1), own.last[0]]
        for layer, states in zip(LAYERS, expected, strict=True):
            found = store.read(index, layer)[0].float()
            torch.testing.assert_close(found, states[:kept], rtol=1 / 128, atol=1e-3)


def test_answers_come_with_their_states(server, record, model, tmp_path, capsys):
    assert record("out") == 0
    check_states(tmp_path / "out", model)
    assert len(server.rows) == 1 + PROMPTS + PROMPTS // 2, "the probe and each turn: no row is asked again"
    assert not any(server.folder.iterdir())
    fit = capsys.readouterr().out.splitlines()[-1].split()
    assert fit[:2] == ["specforge", "fit"]
    words = ["--data.validation=null", "--trainer.fast_dev_run=1", "--model.draft.draft_vocab_size=64"]
    assert main([*fit[1:], *words, f"--data.cache_dir={tmp_path / 'cache'}"]) == 0
    server.requests = 0
    assert record("out") == 0 and not server.requests, "a finished folder is left as it is"


def test_faults_of_the_server_change_nothing(server, record, model, tmp_path):
    assert record("undisturbed") == 0
    server.requests = 0
    wrong = cycle(
        [
            lambda one: {**one, "token_ids": one["token_ids"].flip(0)},
            lambda one: {**one, "hidden_states": one["hidden_states"][2:].contiguous()},
            lambda one: None,
        ]
    )
    server.written = lambda number, tensors: next(wrong)(tensors) if number % 3 == 0 else tensors
    server.fault = lambda number: 503 if number % 7 == 0 else None
    server.lost = lambda number: number % 11 == 0
    assert record("disturbed", "--retries", "6") == 0
    assert rows(tmp_path / "disturbed") == rows(tmp_path / "undisturbed")
    check_states(tmp_path / "disturbed", model)
    assert not any(server.folder.iterdir())


def test_what_an_interrupted_run_has_finished_is_not_asked_again(server, record, model, tmp_path, capfd):
    server.fault = lambda number: 401 if number > 9 else None
    assert record("out", "--concurrency", "1") == 1 and "refuses the API key" in capfd.readouterr().err
    server.fault = lambda number: None
    before = len(server.rows)
    assert record("out") == 0
    assert len(server.rows) - before == 6, "the probe and the turns of three conversations"
    check_states(tmp_path / "out", model)
    assert not any(server.folder.iterdir())


def test_an_engine_that_keeps_no_states_is_explained(server, record, capfd):
    server.extracts = False
    assert record("out") == 1
    assert "does not extract states; start it with" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint"], "--endpoint"),
        (["--record", "nowhere.yaml"], "nowhere.yaml"),
        (["--transport", "fiel"], "Did you mean 'file'?"),
    ],
)
def test_wrong_usage_is_refused(record, capfd, words, message):
    assert record("out", *words) == 2
    assert message in capfd.readouterr().err
