"""Our EAGLE-3 as `specforge fit` trains it: the module's own ``draft_steps`` on stored states, and its metrics' sums.

The module is built by its own functions, without Lightning's trainer around it. Positions are counted as in the
published trainers (``supervision: compat``). Each step forms the verifier's logits of the targets, in chunks, and also
the acceptance probability of every supervised row.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from contestant import Trainer, serve
from task import AUX_LAYERS, STEP_DECAY, Task
from torch import Tensor

from specforge.training.metrics import step_sums
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.module import Eagle3DraftSettings, Eagle3Module


def build(task: Task) -> Trainer:
    """Build the module and its batch."""
    module = Eagle3Module(
        verifier=str(task.verifier),
        draft=Eagle3DraftSettings(draft_vocab_size=task.draft_vocabulary, aux_layers=list(AUX_LAYERS)),
        ttt_steps=task.steps,
        supervision="compat",
        objective={"kl": 1.0} if task.denominator == "valid" else {"cross_entropy": 1.0},
        step_decay=STEP_DECAY,
        denominator=task.denominator,
    )
    data: Any = SimpleNamespace(vocabulary_counts=lambda: task.t2d.long())
    module.teacher.hold(None, VerifierParts.from_pretrained(str(task.verifier)))
    module.create_draft(data)
    module.draft.load_state_dict(task.draft, strict=False)
    tensors = task.tensors
    # A row counts at step k if the state k + 1 tokens later does; compat checks the token k later.
    counts = torch.cat([tensors["counts"][1:], torch.tensor([False])])
    batch = {
        "input_ids": tensors["input_ids"][None],
        "loss_mask": counts[None],
        "document_ids": torch.zeros(1, task.length, dtype=torch.int32),
        "position_ids": torch.arange(task.length)[None],
        "aux": tensors["aux"][None],
        "last": tensors["last"][None],
    }

    def loss() -> Tensor:
        outcome = module.draft_steps(batch, module.features(batch))
        step_sums(outcome)
        return outcome.loss

    return loss, {name: parameter for name, parameter in module.draft.named_parameters() if parameter.requires_grad}


if __name__ == "__main__":
    serve(build)
