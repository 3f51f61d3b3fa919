"""SGLang's `specforge` 0.2.0 on our rows: its draft, ``Eagle3TrainStrategy`` and ``BF16Optimizer`` by their defaults.

AdamW, a cosine after 1.5 % of warmup, clipping at 0.5, a trained head, no norms, losses that decay by 0.8 a step. It
does not pack: the documents of an optimizer step are the rows of a padded batch, so it reads the same data as the
others. Its mask is not shifted, and omits a document's last token, as in its data set. Changed for a CPU: its loss and
attention (see ``sglang_peer``); nothing is compiled; float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from learning import Learner, learn
from rows import Rows
from sglang_peer import draft_of, norm_of, strategy_of
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specforge.optimizer import BF16Optimizer
from specforge.runtime.contracts import TrainBatch

torch._dynamo.config.disable = True  # lengths differ from step to step, and each would be compiled


class SGLang(Learner):
    """Its draft, trained as by its backend."""

    def __init__(self, rows: Rows, rate: float) -> None:
        self.draft = draft_of(rows)
        self.norm = norm_of(rows)
        self.strategy = strategy_of(rows, self.draft)
        self.optimizer = BF16Optimizer(self.draft, lr=rate, total_steps=len(rows.order))

    def loss(self, documents: list[dict[str, Tensor]]) -> Tensor:
        """Pad the documents to a batch."""

        def padded(tensors: Iterable[Tensor]) -> Tensor:
            return pad_sequence(list(tensors), batch_first=True)

        mask = padded(document["loss_mask"][:-1].long() for document in documents)
        batch = TrainBatch(
            [str(number) for number in range(len(documents))],
            "eagle3",
            {
                "input_ids": padded(document["input_ids"] for document in documents),
                "attention_mask": padded(torch.ones_like(document["input_ids"]) for document in documents),
                "loss_mask": torch.nn.functional.pad(mask, (0, 1)),
                "hidden_state": padded(document["aux"].flatten(1) for document in documents),
                "target": padded(self.norm(document["last"]) for document in documents),
            },
            {"target_repr": "hidden_state"},
        )
        value: Tensor = self.strategy.forward_loss(batch).loss
        return value

    def update(self) -> None:
        """Step the optimizer, which includes clipping and the schedule."""
        self.optimizer.step()

    def save(self, folder: Path) -> None:
        """Write it in its export layout for SGLang, without the verifier's embeddings."""
        weights = {name: tensor for name, tensor in self.draft.state_dict().items() if "embed" not in name}
        self.draft.save_pretrained(folder, state_dict=weights)


if __name__ == "__main__":
    learn(SGLang)
