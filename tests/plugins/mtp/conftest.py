"""Tiny verifiers of all families with heads, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mtp_verifiers
import pytest


@pytest.fixture(scope="session")
def verifier_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's verifier; do not change it."""
    root = tmp_path_factory.mktemp("mtp-verifiers")
    return lambda name: root / name if (root / name).is_dir() else mtp_verifiers.write(name, root / name)
