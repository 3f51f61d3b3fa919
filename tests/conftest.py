"""Shared setup: no network, one thread, up to four processes, and tiny random verifiers on disk.

Nothing heavy is imported here: the process that distributes the tests runs none of them.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# At these sizes, synchronising threads takes a hundred times as long as computing.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tiny_verifiers import TinyVerifier

settings.register_profile(
    "tests",
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use up to four cores; a named file or test runs in this process, which starts sooner."""
    return 0 if any(".py" in arg for arg in config.args) else min(4, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def tiny_verifiers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, TinyVerifier]:
    """Saved random verifiers: llama, llama-sharded (both untied), llama-tied, qwen3, gemma2, gemma3, gemma3-images."""
    from tiny_verifiers import save_tiny_verifiers

    return save_tiny_verifiers(tmp_path_factory.mktemp("verifiers"))


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a JSON-lines file in the test's folder; return its path."""

    def write(rows: list[Any], name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
