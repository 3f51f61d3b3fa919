"""`speculators` 0.9.0 on our rows: the draft, loss, optimizers and schedule that its command builds by default.

Its settings are resolved by its own ``TrainConfig``, and its draft is built by the function that its command calls:
three norms, a frozen head, Muon and AdamW at one learning rate, a linear schedule after 1 % of warmup. Documents are
packed as ours are. Changed for a CPU: dense attention masks and its losses in torch, both options of its command line;
float32; the loop, since its Trainer moves the model to a device by number. Clipping at 1.0 is that Trainer's.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from learning import Learner, learn
from rows import Rows
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.train.cli import build_draft_model
from speculators.train.config.schema import TrainConfig
from speculators.train.optimizers import build_optimizers
from speculators_peer import batch_of, document
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

LARGEST_GRADIENT = 1.0


class Speculators(Learner):
    """Its draft, trained as by its Trainer."""

    def __init__(self, rows: Rows, rate: float) -> None:
        given = {
            "speculator_type": "eagle3",
            "verifier_name_or_path": str(rows.verifier),
            "target_layer_ids": rows.aux_layers,
            "ttt_steps": rows.steps,
            "lr": rate,
            "draft_attn_impl": "sdpa",
            "loss_implementation": "eager",
            "mask_token_id": 0,  # EAGLE-3 reads none; otherwise it would be looked up in the tokenizer
        }
        settings = Namespace(**TrainConfig.from_sources(cli=given, argv=[]).flatten())
        self.model = build_draft_model(settings, Eagle3DraftModel, rows.t2d, rows.d2t, len(rows.draft_ids)).train()
        self.arguments, _ = Eagle3DraftModel.get_trainer_kwargs(**vars(settings))
        self.optimizers = build_optimizers(self.model, settings)
        total = len(rows.order)
        self.schedules = [
            get_linear_schedule_with_warmup(optimizer, total // 100, total) for optimizer in self.optimizers
        ]

    def loss(self, documents: list[dict[str, Tensor]]) -> Tensor:
        """Pack the documents into one row."""
        names = ("input_ids", "aux", "last", "loss_mask")
        batch = batch_of([document(*(fields[name] for name in names)) for fields in documents])
        _, value, _ = self.model(**batch, **self.arguments)
        return value

    def update(self) -> None:
        """Step all optimizers and their schedules."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        for part in (*self.optimizers, *self.schedules):
            part.step()
        self.model.zero_grad()

    def save(self, folder: Path) -> None:
        """Write it in the layout of its checkpoints."""
        self.model.save_pretrained(folder)


if __name__ == "__main__":
    learn(Speculators)
