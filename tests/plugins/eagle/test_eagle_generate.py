"""Generating with an EAGLE-1 draft gives the verifier's own text; and the examples of the documented interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from eagle_drafts import OPTIONS, random_draft
from random_verifiers import CONFIGS
from transformers import AutoConfig, PreTrainedModel

from specforge.decoding.loop import Decoder
from specforge.models import EagleSpeculator
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import capture

VerifierOf = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("proposal", ["greedy", "dynamic_tree:depth=4,expansion_factor=3,speculative_tokens=9"])
@pytest.mark.parametrize("family", CONFIGS)
def test_text_is_the_verifiers_own(family: str, proposal: str, verifier_of: VerifierOf) -> None:
    verifier = verifier_of(family)
    ids = torch.randint(1, 31, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = verifier.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    for options in OPTIONS.values():
        draft = random_draft(verifier, **options)
        assert torch.equal(draft.generate(ids, max_new_tokens=20, proposal=proposal), expected)


def test_text_is_accepted_from_a_draft_that_is_right(verifier_of: VerifierOf) -> None:
    """A draft that has memorised the answer is accepted, so the loop reads proposals correctly."""
    verifier = verifier_of("llama")
    prompt = torch.tensor([[4, 9, 2, 17]])
    text = verifier.generate(prompt, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(prompt))
    torch.manual_seed(0)
    draft = EagleSpeculator.from_training_args(verifier.config).double()
    draft.attach_verifier(verifier)
    positions = torch.arange(text.shape[1])[None]
    features = capture(verifier, text, positions, draft.aux_layers)
    documents = torch.zeros_like(positions)
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    for _ in range(250):
        logits = draft.logits(draft.unroll(text, features, positions, documents, steps=4))
        loss = sum(
            torch.nn.functional.cross_entropy(logits[step, 0, 3 : -2 - step], text[0, 5 + step :]) for step in range(4)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoder = Decoder(verifier, draft, GreedyTokenProposalConfig(speculative_tokens=4))
    rounds = [emission for emission in decoder.decode([prompt[0]], 24) if emission.drafted is not None]
    assert sum(len(emission.tokens) for emission in rounds) > 3 * len(rounds)
    assert torch.equal(draft.generate(prompt, max_new_tokens=24), text)


def test_example_of_the_configuration(tiny_verifiers: Mapping[str, Any]) -> None:
    verifier_name = str(tiny_verifiers["llama"].folder)

    from specforge import SpeculatorsConfig, VerifierConfig
    from specforge.models import EagleSpeculatorConfig

    config = EagleSpeculatorConfig(
        transformer_layer_config=AutoConfig.from_pretrained(verifier_name),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle",
            proposal_methods=[
                GreedyTokenProposalConfig(),
            ],
            default_proposal_method="greedy",
            verifier=VerifierConfig(
                name_or_path=verifier_name,
                architectures=["LlamaForCausalLM"],
            ),
        ),
    )
    assert EagleSpeculatorConfig.from_dict(config.to_dict()) == config


def test_example_of_the_speculator(tiny_verifiers: Mapping[str, Any]) -> None:
    verifier_name = str(tiny_verifiers["llama"].folder)

    from specforge import SpeculatorsConfig, VerifierConfig
    from specforge.models import EagleSpeculator, EagleSpeculatorConfig

    config = EagleSpeculatorConfig(
        transformer_layer_config=AutoConfig.from_pretrained(verifier_name),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle",
            proposal_methods=[
                GreedyTokenProposalConfig(),
            ],
            default_proposal_method="greedy",
            verifier=VerifierConfig(
                name_or_path=verifier_name,
                architectures=["LlamaForCausalLM"],
            ),
        ),
    )
    speculator = EagleSpeculator(config, verifier=verifier_name, verifier_attachment_mode="full")

    input_ids = torch.tensor([[1, 5, 7]])
    outputs = speculator.generate(input_ids, max_new_tokens=8)
    own = tiny_verifiers["llama"].model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(outputs, own)
    speculator.detach_verifier()

    # For training.
    speculator.attach_verifier(verifier_name, mode="train_only")
    outputs = speculator(input_ids, torch.randn(1, 3, 16))
    assert outputs.logits.shape == (1, 3, 61)
    speculator.detach_verifier()
