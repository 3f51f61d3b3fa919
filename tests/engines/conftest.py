"""The verifier whose states the engines of these tests extract."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from specforge.verifier.loading import load_verifier

VERIFIER = Path(__file__).parents[2] / "configs" / "quickstart" / "verifier"


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    """The quickstart's verifier; no test changes it."""
    return load_verifier(str(VERIFIER))
