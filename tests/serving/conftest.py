"""Fixtures for tests of programs that read our exports.

These tests need their own environment, which ``tests/serving/run`` creates; without it they are skipped.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from serving import DRAFTS, Served, ask_vllm, engine_options, fit
from wide_verifier import QUICKSTART, write_wide_verifier

from specforge.__main__ import main

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's verifier with heads that engines have kernels for."""
    folder = tmp_path_factory.mktemp("verifier")
    write_wide_verifier(folder)
    return folder


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of some prompts."""
    lines = (QUICKSTART / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    rows = [json.loads(line) for line in lines]
    return [row["input_ids"][: row["loss_mask"].index(1)] for row in rows]


@pytest.fixture(scope="session")
def served(verifier: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A draft of each algorithm, trained for half a minute and exported for its reader."""
    root = tmp_path_factory.mktemp("served")
    runs = {algorithm: fit(algorithm, verifier, root, draft) for algorithm, draft in DRAFTS.items()}
    exports = {algorithm: root / f"{algorithm}-export" for algorithm in DRAFTS}
    for algorithm, run in runs.items():
        words = ["--format", DRAFTS[algorithm].format, "--verifier", str(verifier), "--output", str(exports[algorithm])]
        assert main(["export", str(run), *words]) == 0
    return Served(verifier, runs, exports, prompts)


@pytest.fixture(scope="session")
def answers(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """vLLM's output without a draft (``none``) and with each draft, and its counters."""
    options = {name: engine_options(name, served.exports[name]) for name in DRAFTS}
    interpreted = {name: options.pop(name) for name, draft in DRAFTS.items() if draft.interpreted}
    folder = tmp_path_factory.mktemp("vllm")
    plain = ask_vllm(served, {"none": {}, **options}, folder, "engine.py", len(served.prompts))
    # The interpreter takes a second a round: one batch of prompts.
    return plain | ask_vllm(served, interpreted, folder, "interpreted_engine.py", 8)
