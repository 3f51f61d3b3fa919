"""vLLM's CPU build serves our exports: its text is the verifier's own, and it accepts what our decoder accepts.

It serves EAGLE-1, EAGLE-3, P-EAGLE, the draft model and DFlash of one layer as it is, MLP speculators with our
proposer; DFlash2 and DSpark of two layers with Triton's interpreter and two faults mended (``interpreted_engine.py``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import DRAFTED, DRAFTS, MAX_TOKENS, Served
from transformers import AutoModelForCausalLM

from specforge import SpeculatorModel
from specforge.decoding.loop import Decoder
from specforge.proposals import GreedyTokenProposalConfig


@pytest.mark.parametrize("name", DRAFTS)
def test_text_equals_that_without_speculation(name: str, answers: dict[str, Any]) -> None:
    tokens = answers[name]["tokens"]
    assert tokens == answers["none"]["tokens"][: len(tokens)]


@pytest.mark.parametrize("name", DRAFTS)
def test_it_accepts_what_we_accept(name: str, answers: dict[str, Any], served: Served) -> None:
    verifier = AutoModelForCausalLM.from_pretrained(served.verifier, dtype=torch.float32).eval()
    draft = SpeculatorModel.from_pretrained(served.runs[name] / "draft", verifier=verifier)
    proposal = GreedyTokenProposalConfig(speculative_tokens=DRAFTED)
    decoder = Decoder(verifier, draft, proposal, stop_tokens=[])
    prompts = [torch.tensor(tokens) for tokens in served.prompts[: len(answers[name]["tokens"])]]
    rounds = [one for one in decoder.decode(prompts, MAX_TOKENS) if one.drafted is not None]
    counted = answers[name]["counters"]
    ours = sum(len(one.tokens) for one in rounds) / len(rounds)
    theirs = 1 + counted["accepted_tokens"] / counted["drafts"]
    print(f"{name}: {counted['drafts']} passes, {theirs:.3f} tokens each in vLLM; {len(rounds)}, {ours:.3f} here")
    # vLLM also counts what it accepts after the last requested token, so only the passes are the same number.
    assert counted["drafts"] == pytest.approx(len(rounds), rel=0.01)
    assert ours > 1.3, "a useless draft would prove nothing"
