"""Small verifiers by family, each made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from random_verifiers import random_verifier
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def verifier_of() -> Callable[[str], PreTrainedModel]:
    return cache(random_verifier)
