"""Drafts of every algorithm for a small verifier with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from specforge.models import Eagle3DraftModel, EagleSpeculator, MLPSpeculator
from specforge.models.drafter import Drafter
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.parts import VerifierParts

VERIFIER = Path(__file__).parents[2] / "configs" / "quickstart" / "verifier"


def make(algorithm: str, **options: Any) -> SpeculatorModel:
    """Make a draft with random tensors, norms included."""
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


def break_drafter(draft: SpeculatorModel, patch: pytest.MonkeyPatch) -> None:
    """Make drafters of a draft's class read a wrong token instead of the last decided one."""
    original = type(draft).drafter

    def broken(self: SpeculatorModel, batch_size: int) -> Drafter:
        drafter = original(self, batch_size)
        commit = drafter.commit
        drafter.commit = lambda tokens, features, counts: commit((tokens + 1) % 100, features, counts)  # type: ignore
        return drafter

    patch.setattr(type(draft), "drafter", broken)
