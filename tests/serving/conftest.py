"""Fixtures for tests of programs that read our exports.

These tests need their own environment, which ``tests/serving/run`` creates; without it they are skipped.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from serving import FORMATS, MODELS, Served, ask_vllm, fit, speculation
from wide_verifier import QUICKSTART, write_wide_verifier

from specforge.__main__ import main

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A draft of each algorithm, trained for half a minute and exported for its reader."""
    root = tmp_path_factory.mktemp("served")
    verifier = root / "verifier"
    write_wide_verifier(verifier)
    runs = {algorithm: fit(algorithm, verifier, root) for algorithm in MODELS}
    exports = {algorithm: root / f"{algorithm}-export" for algorithm in MODELS}
    for algorithm, run in runs.items():
        words = ["--format", FORMATS[algorithm], "--verifier", str(verifier), "--output", str(exports[algorithm])]
        assert main(["export", str(run), *words]) == 0
    lines = (QUICKSTART / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    rows = [json.loads(line) for line in lines]
    prompts = [row["input_ids"][: row["loss_mask"].index(1)] for row in rows]
    return Served(verifier, runs, exports, prompts)


@pytest.fixture(scope="session")
def answers(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """vLLM's output without a draft (``none``) and with each draft, and its counters."""
    engines: dict[str, dict[str, Any]] = {
        "none": {},
        "eagle3": speculation(str(served.exports["eagle3"]), "eagle3"),
        "eagle": speculation(str(served.exports["eagle"]), "eagle"),
        "mlp": {
            **speculation("specforge_mlp.vllm.MLPProposer", "custom_class"),
            "additional_config": {"mlp_speculator": str(served.exports["mlp"])},
        },
    }
    return ask_vllm(served, engines, tmp_path_factory.mktemp("vllm"))
