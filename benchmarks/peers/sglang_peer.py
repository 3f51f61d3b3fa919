"""SGLang's `specforge` 0.2.0: ``Eagle3TrainStrategy.forward_loss`` on stored states, as its trainer calls it.

Its step reads states after the final norm, so it never applies the norm. It forms the verifier's logits over the full
vocabulary for every row, their probabilities over the draft vocabulary, and the draft's logits, losses, accuracies and
acceptance rates of every row at every step, before a mask selects some. With ``compact`` as a second argument, the
verifier's logits are reduced in slices of the vocabulary, as by its option ``compact_teacher``.

Changed for a CPU: its Triton kernel of the loss is replaced by its own reference of the same formula in torch, compiled
as in the package (like its norms and rotary embeddings; a C++ compiler is needed). Attention is its ``sdpa``,
the package's own formula with all weights of the first block, instead of flex attention, which has no backward pass
on a CPU. Changed for equal work: torch's AdamW without the second copy of weights that its own optimizer keeps for
bfloat16; float32 instead of bfloat16.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from contestant import Trainer, serve
from drafting import Drafting
from safetensors.torch import load_file
from task import STEP_DECAY, Task
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from specforge.algorithms.eagle3 import model as eagle3
from specforge.core.loss import _compute_loss
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.modeling.target.target_head import TargetHead
from specforge.runtime.contracts import TrainBatch
from specforge.training.strategies.base import Eagle3TrainStrategy


def build(task: Task) -> Trainer:
    """Build the draft, the strategy around it, and its batch."""
    draft = draft_of(task)
    draft.load_state_dict({published(name): tensor for name, tensor in task.draft.items()}, strict=False)
    strategy = strategy_of(task, draft, ploss_decay=STEP_DECAY, compact_teacher="compact" in sys.argv[2:])
    tensors = task.tensors
    # The mask is that of the token whose next state is the target.
    mask = torch.cat([tensors["counts"][1:], torch.tensor([False])]).long()[None]
    batch = TrainBatch(
        ["0"],
        "eagle3",
        {
            "input_ids": tensors["input_ids"][None],
            "attention_mask": torch.ones_like(mask),
            "loss_mask": mask,
            "hidden_state": tensors["aux"].flatten(1)[None],
            "target": norm_of(task)(tensors["last"])[None],
        },
        {"target_repr": "hidden_state"},
    )

    def loss() -> Tensor:
        value: Tensor = strategy.forward_loss(batch).loss
        return value

    trained = {ours(name): parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}
    return loss, trained


def draft_of(task: Drafting) -> LlamaForCausalLMEagle3:
    """Build the draft of one layer, with the verifier's embeddings and the task's vocabulary."""
    config = LlamaConfig.from_pretrained(task.verifier)
    config.num_hidden_layers = 1
    config.draft_vocab_size = len(task.draft_ids)
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
    draft.t2d.copy_(task.t2d)
    draft.d2t.copy_(task.d2t)
    draft.load_embedding(str(task.verifier))
    draft.freeze_embedding()
    return draft


def strategy_of(task: Drafting, draft: LlamaForCausalLMEagle3, **settings: Any) -> Eagle3TrainStrategy:
    """Build the strategy that trains a draft against the verifier's head."""
    eagle3.LogSoftmaxLoss = SimpleNamespace(apply=_compute_loss)
    head = TargetHead(str(task.verifier))
    head.load_weights(str(task.verifier))
    head.freeze_weights()
    model = eagle3.OnlineEagle3Model(draft, length=task.steps, attention_backend="sdpa")
    return Eagle3TrainStrategy(model.train(), target_head=head, **settings)


def norm_of(task: Drafting) -> LlamaRMSNorm:
    """Return the verifier's final norm."""
    config = LlamaConfig.from_pretrained(task.verifier)
    norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps).requires_grad_(False)
    norm.weight.copy_(load_file(task.verifier / "model.safetensors")["model.norm.weight"])
    return norm


def published(name: str) -> str:
    """Return the package's name of a weight."""
    return name.replace("layers.0.", "midlayer.")


def ours(name: str) -> str:
    """Return the task's name of a weight."""
    return name.replace("midlayer.", "layers.0.")


if __name__ == "__main__":
    serve(build)
