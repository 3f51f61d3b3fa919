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
from specforge_dflash.dflash2 import DFlash2DraftModel
from specforge_dflash.dspark import DSparkDraftModel
from specforge_dflash.model import DFlashDraftModel
from specforge_draft_model.model import DraftModel
from specforge_mtp.model import MtpDraftModel
from specforge_peagle.model import PEagleDraftModel

SMALL_BLOCKS = {"num_layers": 2, "aux_hidden_state_layer_ids": [2, 4, 5], "mask_token_id": 0, "block_size": 4}
BLOCKS: dict[str, tuple[type[DFlashDraftModel], dict[str, Any]]] = {
    "dflash": (DFlashDraftModel, {}),
    "dflash2": (DFlash2DraftModel, {"selector_rank": 8, "selector_top_k": 5}),
    "dspark": (DSparkDraftModel, {"markov_rank": 8, "sample_from_anchor": True}),
}
VERIFIER = Path(__file__).parents[2] / "configs" / "quickstart" / "verifier"


def make(algorithm: str, **options: Any) -> SpeculatorModel:
    """Make a draft with random tensors, norms included."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(VERIFIER)
    options = {"verifier_name_or_path": str(VERIFIER), **options}
    draft: Any
    if algorithm in BLOCKS:
        network, own = BLOCKS[algorithm]
        draft = network.from_training_args(config, **{**SMALL_BLOCKS, **own, **options})
    elif algorithm == "eagle3":
        options = {"t2d": torch.arange(config.vocab_size) % 3 == 0, **options}
        draft = Eagle3DraftModel.from_training_args(config, **options)
    elif algorithm == "peagle":
        options = {"t2d": torch.arange(config.vocab_size) % 3 == 0, "mask_token_id": 3, **options}
        draft = PEagleDraftModel.from_training_args(config, **options)
    elif algorithm == "mtp":
        draft = MtpDraftModel.from_training_args(config, fresh=True, **options)
    elif algorithm == "draft_model":
        own = AutoConfig.from_pretrained(VERIFIER, num_hidden_layers=2)
        draft = DraftModel.from_training_args(config, own, **options)
    else:
        draft = {"eagle": EagleSpeculator, "mlp": MLPSpeculator}[algorithm].from_training_args(config, **options)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    draft.attach_verifier(VerifierParts.from_pretrained(str(VERIFIER)))
    return draft


def break_drafter(draft: SpeculatorModel, patch: pytest.MonkeyPatch) -> None:
    """Make drafters of a draft's class read a wrong token instead of the last committed token."""
    original = type(draft).drafter

    def broken(self: SpeculatorModel, batch_size: int) -> Drafter:
        drafter = original(self, batch_size)
        commit = drafter.commit
        drafter.commit = lambda tokens, features, counts: commit((tokens + 1) % 100, features, counts)  # type: ignore
        return drafter

    patch.setattr(type(draft), "drafter", broken)
