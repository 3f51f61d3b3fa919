"""Tests of the draft against its equation, and ``specforge plugins check``."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specforge.commands.plugin_check import check_algorithm
from specforge.verifier.features import capture
from specforge_recurrent.config import RecurrentConfig
from specforge_recurrent.model import RecurrentModel


@torch.no_grad()
def test_training_computes_the_equation() -> None:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    verifier = LlamaForCausalLM(LlamaConfig(vocab_size=29, hidden_size=16, **sizes)).double().eval()
    draft = RecurrentModel(RecurrentConfig(hidden_size=16, vocab_size=29)).double()
    draft.attach_verifier(verifier)
    tokens = torch.arange(9)[None] * 5 % 29
    positions = torch.arange(9)[None]
    features = capture(verifier, tokens, positions, [])
    hidden = draft.unroll(tokens, features, positions, torch.zeros_like(positions), 3)
    state = verifier.model.norm(features.last[0, 4])
    for step in range(3):
        state = draft.cell(verifier.get_input_embeddings()(tokens[0, 5 + step]), state)
        torch.testing.assert_close(hidden[step, 0, 4], state)
        torch.testing.assert_close(draft.logits(hidden[step, 0, 4]), draft.lm_head.weight @ state)


def test_it_trains_drafts_and_decodes() -> None:
    found = dict(check_algorithm("recurrent", ["--model.tokens", "3"]))
    assert not [fault for fault in found.values() if fault is not None], found
