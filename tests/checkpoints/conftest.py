"""Drafts of every algorithm for a small verifier whose tokenizer knows chats, and the commands on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from specforge.__main__ import main
from specforge.models import Eagle3DraftModel, EagleSpeculator, MLPSpeculator
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.parts import VerifierParts

VERIFIER = Path(__file__).parents[2] / "configs" / "quickstart" / "verifier"


def make(algorithm: str, **options: Any) -> SpeculatorModel:
    """Make a draft whose tensors are all at random, norms included."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(VERIFIER)
    options = {"verifier_name_or_path": str(VERIFIER), **options}
    if algorithm == "eagle3":
        options = {"t2d": torch.arange(config.vocab_size) % 3 == 0, **options}
        draft: Any = Eagle3DraftModel.from_training_args(config, **options)
    else:
        draft = {"eagle": EagleSpeculator, "mlp": MLPSpeculator}[algorithm].from_training_args(config, **options)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    draft.attach_verifier(VerifierParts.from_pretrained(str(VERIFIER)))
    return draft


@pytest.fixture(scope="session")
def draft_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Store a draft of an algorithm and return its folder; equal ones are stored once."""
    made: dict[str, Path] = {}

    def store(algorithm: str, **options: Any) -> Path:
        key = f"{algorithm} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("stored") / "draft"
            make(algorithm, **options).save_pretrained(made[key])
        return made[key]

    return store


@pytest.fixture(scope="session")
def exported(draft_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a draft in a format, the verifier run; equal ones are exported once."""
    made: dict[str, Path] = {}

    def order(key: str, *words: str, **options: Any) -> Path:
        name = f"{key} {words} {options}"
        if name not in made:
            algorithm, format = key.split("/")
            folder = tmp_path_factory.mktemp("exports") / format
            source = draft_of(algorithm, **options)
            assert main(["export", str(source), "--format", format, "--output", str(folder), *words]) == 0
            made[name] = folder
        return made[name]

    return order
