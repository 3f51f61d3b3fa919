"""Stored drafts and their exports, created once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_drafts import make

from specforge.__main__ import main


@pytest.fixture(scope="session")
def draft_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Store a draft of an algorithm and return its folder; identical ones are stored once."""
    created: dict[str, Path] = {}

    def store(algorithm: str, **options: Any) -> Path:
        key = f"{algorithm} {options}"
        if key not in created:
            created[key] = tmp_path_factory.mktemp("stored") / "draft"
            make(algorithm, **options).save_pretrained(created[key])
        return created[key]

    return store


@pytest.fixture(scope="session")
def exported(draft_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a draft in a format, running the verifier; identical ones are exported once."""
    created: dict[str, Path] = {}

    def export(key: str, *words: str, **options: Any) -> Path:
        name = f"{key} {words} {options}"
        if name not in created:
            algorithm, format = key.split("/")
            folder = tmp_path_factory.mktemp("exports") / format
            source = draft_of(algorithm, **options)
            assert main(["export", str(source), "--format", format, "--output", str(folder), *words]) == 0
            created[name] = folder
        return created[name]

    return export
