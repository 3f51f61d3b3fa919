"""A few seeded training steps of every algorithm against stored figures, which a refactoring must not change.

After an intended change of the figures, store new ones:

    PYTHONPATH=tests/support python tests/training/test_loss_traces.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_verifiers import save_tiny_verifiers
from torch import Tensor

from specforge.training.module import DraftModule
from specforge.verifier.parts import VerifierParts
from specforge_eagle.module import EagleModule
from specforge_eagle3.module import Eagle3DraftSettings, Eagle3Module
from specforge_mlp.module import MLPModule

FIGURES = Path(__file__).with_suffix(".json")
STEPS = 6
PRUNED = Eagle3DraftSettings(draft_vocab_size=40)
CASES: dict[str, tuple[type[DraftModule], dict[str, Any]]] = {
    "eagle": (EagleModule, {"noise": 0.1}),
    "hass": (EagleModule, {"noise": 0.1, "alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0}}),
    "eagle3": (Eagle3Module, {"draft": PRUNED, "ttt_steps": 3, "objective": {"kl": 0.5, "lk_lambda": 0.5}}),
    "eagle3 compat": (Eagle3Module, {"draft": PRUNED, "ttt_steps": 3, "supervision": "compat", "step_decay": 1.0}),
    "mlp": (MLPModule, {"objective": {"text": 1.0, "kl": 0.5}, "supervision": "all"}),
}


def make_batch(number: int) -> dict[str, Tensor]:
    """Two packed rows; tokens and loss mask depend on the number."""
    draw = torch.Generator().manual_seed(number)
    return {
        "input_ids": torch.randint(3, 61, (2, 24), generator=draw),
        "loss_mask": (torch.arange(24) + torch.randint(9, (2, 1), generator=draw)) % 9 > 1,
        "document_ids": torch.tensor([[0] * 13 + [1] * 9 + [-1] * 2, [0] * 24]),
        "position_ids": torch.tensor([[*range(13), *range(9), 0, 0], [*range(24)]]),
    }


def figures_of(case: str, tiny_verifiers: Mapping[str, Any]) -> Iterator[list[float]]:
    """Yield the loss and the mean acceptance of each draft step, for every training step."""
    module_class, options = CASES[case]
    made = tiny_verifiers["llama"]
    torch.manual_seed(0)
    module = module_class(verifier=str(made.folder), **options)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=STEPS)
    data: Any = SimpleNamespace(vocabulary_counts=lambda: torch.arange(61, 0, -1))
    module.teacher.hold(made.model.requires_grad_(False), VerifierParts.of(made.model))
    module.create_draft(data)
    optimizer = torch.optim.AdamW(module.draft.parameters(), lr=3e-3)
    for number in range(STEPS):
        batch = make_batch(number)
        outcome = module.draft_steps(batch, module.features(batch))
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        yield [outcome.loss.item(), *(outcome.acceptance.sum(1) / outcome.supervised.sum(1)).tolist()]


@pytest.mark.parametrize("case", CASES)
def test_training_steps_have_the_stored_figures(case: str, tiny_verifiers: Mapping[str, Any]) -> None:
    stored = json.loads(FIGURES.read_text())[case]
    assert len(stored) == STEPS
    for number, (found, expected) in enumerate(zip(figures_of(case, tiny_verifiers), stored, strict=True)):
        assert found == pytest.approx(expected, rel=1e-4), f"step {number}"


def store_figures() -> None:
    """Store the figures that the code computes now."""
    with tempfile.TemporaryDirectory() as folder:
        verifiers = save_tiny_verifiers(Path(folder))
        lines = [f"{json.dumps(case)}: {json.dumps(list(figures_of(case, verifiers)))}" for case in CASES]
    FIGURES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    store_figures()
