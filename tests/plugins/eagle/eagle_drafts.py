"""EAGLE drafts for random verifiers whose layers matter."""

from __future__ import annotations

from typing import Any

from random_verifiers import fill
from torch import Tensor
from transformers import PreTrainedModel

from specforge.documents import DocumentLayout
from specforge.models.draft_rows import DraftRows
from specforge_eagle.model import EagleSpeculator

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fusion bias": {"fusion_bias": True},
    "layernorms": {"layernorms": True},
    "both": {"layernorms": True, "fusion_bias": True},
}


def random_draft(verifier: PreTrainedModel, seed: int = 1, **options: Any) -> EagleSpeculator:
    """Make an untrained draft, attached to its verifier."""
    draft = EagleSpeculator.from_training_args(verifier.config, **options)
    fill(draft, seed)
    draft.attach_verifier(verifier)
    return draft.double()


def chain_of_all(
    draft: EagleSpeculator,
    tokens: Tensor,
    feature: Tensor,
    positions: Tensor,
    documents: Tensor,
    steps: int,
    detached: bool = False,
) -> Tensor:
    """Run a chain at every row; what it predicts, [K, B, T, H]."""
    rows = DraftRows.all(steps, tokens.numel(), DocumentLayout.of(documents))
    return draft.chain(tokens, feature, positions, rows, detached=detached).view(steps, *tokens.shape, -1)
