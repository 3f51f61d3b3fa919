"""States asked of a real vLLM server, if one is given: its URL and the configuration that it was started for.

SPECFORGE_SERVER=http://HOST:8000/v1 SPECFORGE_SERVER_CONFIG=FILE python -m pytest tests/engines/test_real_server.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specforge.__main__ import main
from specforge.data.features.store import FeatureStore

SERVER, CONFIG = os.environ.get("SPECFORGE_SERVER", ""), os.environ.get("SPECFORGE_SERVER_CONFIG", "")
pytestmark = pytest.mark.skipif(not (SERVER and CONFIG), reason="SPECFORGE_SERVER and SPECFORGE_SERVER_CONFIG")


def test_it_is_in_order() -> None:
    assert main(["doctor", "--endpoint", SERVER, "--config", CONFIG, "--compare"]) == 0


def test_features_are_those_of_our_own_capture(tmp_path: Path) -> None:
    words = ["prepare", "features", "--config", CONFIG, "--dtype", "float32"]
    assert main([*words, "--output", str(tmp_path / "own")]) == 0
    assert main([*words, "--output", str(tmp_path / "asked"), "--endpoint", SERVER]) == 0
    own, asked = FeatureStore(tmp_path / "own"), FeatureStore(tmp_path / "asked")
    for index in range(len(own.kept)):
        for layer in own.manifest.layers:
            expected, found = own.read(index, layer)[0], asked.read(index, layer)[0]
            errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
            assert errors.median() < 0.05, (index, layer)
