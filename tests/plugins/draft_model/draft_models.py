"""Language models as drafts for random verifiers, and the same weights run by transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from random_verifiers import CONFIGS, fill
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from specforge_draft_model.model import DraftModel

# Norms and softmax of transformers compute in float32.
ROUNDED = {"atol": 1e-4, "rtol": 1e-4}
GPT2: dict[str, Any] = {"n_embd": 16, "n_head": 4, "n_positions": 64, "bos_token_id": None, "eos_token_id": None}
FAMILIES = (*CONFIGS, "gpt2")


def random_draft(verifier: PreTrainedModel, family: str, seed: int = 1, layers: int = 2, **changes: Any) -> DraftModel:
    """Make an untrained draft in float64, attached to its verifier."""
    vocabulary = verifier.config.vocab_size
    config = GPT2Config(**GPT2, n_layer=3, vocab_size=vocabulary) if family == "gpt2" else CONFIGS[family]()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    for name, value in changes.items():
        setattr(config, name, value)
    draft = DraftModel.from_training_args(verifier.config, config)
    fill(draft, seed)
    draft.cast(torch.float64).attach_verifier(verifier)
    return draft.requires_grad_(False)


def plain_model(draft: DraftModel) -> PreTrainedModel:
    """Return the same network as built by transformers, without packed rows and trees."""
    config = copy.deepcopy(draft.config.language_model)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    state = draft.language_model.state_dict()
    head = {} if "lm_head.weight" in state else {"lm_head.weight": draft.head_weights}
    model.load_state_dict({**state, **head})
    return model.eval().requires_grad_(False)


def plain_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [T, D] after each token of one text, without a cache."""
    logits: Tensor = model(tokens[None], use_cache=False).logits[0]
    return logits
