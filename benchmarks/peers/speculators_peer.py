"""`speculators` 0.9.0: ``Eagle3DraftModel`` built by ``from_training_args``, called as its Trainer calls it.

Its step reads states before the final norm and computes the verifier's logits over only the draft vocabulary, for every
row of the batch; then the draft's logits, losses and accuracies of every row at every step, before a mask selects some.
It never needs the verifier's full vocabulary, since it also counts rows whose most probable token is no draft token.

Changed for a CPU: attention by ``sdpa`` with a dense mask instead of flex attention, and its own ``eager`` losses
instead of its Triton kernels; both are options of its command line. Its Trainer does not start without an accelerator,
and compiles the forward pass on CUDA only. Changed for equal work: its head is trained (it freezes it), the losses of
later steps decay by 0.8 (1.0 by default), float32 instead of bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from contestant import Trainer, serve
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.data import CollateFn
from task import AUX_LAYERS, STEP_DECAY, Task
from torch import Tensor
from transformers import LlamaConfig


def build(task: Task) -> Trainer:
    """Build the draft and its batch."""
    layers = LlamaConfig.from_pretrained(task.verifier)
    layers.num_hidden_layers = 1
    settings = {"ttt_steps": task.steps, "ttt_step_loss_decay": STEP_DECAY}
    model = Eagle3DraftModel.from_training_args(
        layers,
        t2d=task.t2d,
        d2t=task.d2t,
        draft_vocab_size=task.draft_vocabulary,
        norm_before_residual=False,
        target_layer_ids=list(AUX_LAYERS),
        verifier_name_or_path=str(task.verifier),
        draft_attn_impl="sdpa",
        **settings,
    )
    model.load_state_dict(task.draft, strict=False)
    model.lm_head.requires_grad_(True)
    model.train()
    arguments, _ = Eagle3DraftModel.get_trainer_kwargs(loss_fn="kl_div", loss_implementation="eager", **settings)
    tensors = task.tensors
    documents = [document(*(tensors[name] for name in ("input_ids", "aux", "last", "counts")))]
    batch = batch_of(documents)

    def loss() -> Tensor:
        _, value, _ = model(**batch, **arguments)
        return value

    return loss, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def document(input_ids: Tensor, aux: Tensor, last: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return a document in the form of its data set.

    Args:
        input_ids: Tokens, int64 [T].
        aux: The verifier's states at the aux layers, [T, n, H].
        last: Its states before the final norm, [T, H].
        counts: Which tokens are supervised, bool [T].
    """
    return {
        "input_ids": input_ids,
        "hidden_states": aux.flatten(1),
        "verifier_last_hidden_states": last,
        "loss_mask": counts,
        "lengths": torch.tensor([len(input_ids)]),
        "position_ids": torch.arange(len(input_ids)),
    }


def batch_of(documents: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Pack documents into one row without padding, shifted as in its Trainer."""
    tokens = sum(len(fields["input_ids"]) - 1 for fields in documents)
    width = documents[0]["verifier_last_hidden_states"].shape[1]
    batch = CollateFn(tokens, width, dtype=torch.float32, preprocess=shift_batch)(documents)
    batch.pop("error_records")
    return batch


if __name__ == "__main__":
    serve(build)
