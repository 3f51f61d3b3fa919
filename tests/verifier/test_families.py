"""Verifiers of families other than Llama: what each kind needs.

``python tests/verifier/families.py`` tries all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import YES, Outcome, Trial, packed_states_are_right, table
from tiny_families import FAMILIES, LAYERS, make
from torch import Tensor

from specforge.models import SpeculatorModel
from specforge.models.base_components import norm_scale
from specforge.verifier.features import capture, check_logits, decoder_layers, packs
from specforge.verifier.fingerprint import fingerprint
from specforge.verifier.loading import load_verifier
from specforge.verifier.parts import VerifierParts
from specforge_eagle.model import EagleSpeculator
from specforge_eagle3.model import Eagle3DraftModel
from specforge_mlp.model import MLPSpeculator

# One of each kind, with whether it packs: attention sinks, recurrent layers, no attention, convolutions, chunks, learnt
# positions, widths that differ by layer, latent attention, a scaled head, partly rotated heads, several modalities.
KINDS = {
    "gpt_oss": False,
    "nemotron_h": False,
    "mamba2": False,
    "lfm2": False,
    "granite": True,
    "opt": True,
    "gemma4 text": True,
    "deepseek_v3": True,
    "glm4": True,
    "qwen2_5_vl": True,
    "llama4": False,
    "qwen3_5": False,
}
DRAFTS = [
    (Eagle3DraftModel, {}),
    (EagleSpeculator, {"fusion_bias": True}),
    (MLPSpeculator, {}),
]


@pytest.mark.parametrize("name", KINDS)
def test_a_family_is_a_verifier_with_every_algorithm(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path)
    verifier = load_verifier(str(tmp_path))
    check_logits(verifier)
    assert len(decoder_layers(verifier)) == LAYERS
    assert packs(verifier) == KINDS[name]
    assert fingerprint(str(tmp_path))
    assert packed_states_are_right(verifier)
    read, own = VerifierParts.from_pretrained(str(tmp_path)), VerifierParts.of(verifier)
    states = torch.randn(5, read.lm_head.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read.logits(states), own.logits(states))
    assert torch.equal(read.embed_tokens.weight, made.get_input_embeddings().weight)
    for network, options in DRAFTS:
        draft = network.from_training_args(verifier.config, verifier_name_or_path=str(tmp_path), **options)
        draft.attach_verifier(own)
        if not isinstance(draft, MLPSpeculator):
            draft.borrow_weights()
        assert_it_learns(draft, verifier)
        again = type(draft.config).from_dict(draft.config.to_dict())
        assert again.to_dict() == draft.config.to_dict()


def assert_it_learns(draft: SpeculatorModel, verifier: Any) -> None:
    """Every weight of a draft has a nonzero gradient from the first step."""
    tokens = torch.arange(3, 15)[None]
    positions, documents = torch.tensor([[*range(7), *range(5)]]), torch.tensor([[0] * 7 + [1] * 5])
    features = capture(verifier, tokens, positions, draft.aux_layers)
    logits = [
        draft.logits(states, step)
        for step, states in enumerate(draft.unroll(tokens, features, positions, documents, 3))
    ]
    torch.stack([logit.float().logsumexp(-1).sum() for logit in logits]).sum().backward()
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), f"{name} does not learn"


def test_states_that_cannot_be_packed_are_stored_exported_and_probed(tmp_path: Path) -> None:
    outcome = Trial("bamba", tmp_path)
    assert outcome.stored() == YES
    assert outcome.export("stored") == YES
    assert "cannot verify drafts: it has layers of" in outcome.generate("stored")


@pytest.mark.parametrize("name", ["llama4 text", "gemma4 text"])
def test_generation_is_the_verifiers_own(name: str, tmp_path: Path) -> None:
    """Longer than an attention chunk of 16 tokens."""
    make(name, tmp_path)
    verifier = load_verifier(str(tmp_path))
    torch.manual_seed(0)
    draft = Eagle3DraftModel.from_training_args(verifier.config)
    draft.attach_verifier(verifier)
    draft.borrow_weights()
    prompts = torch.tensor([[5, 9, 14, 33, 60, 8, 9], [7, 3, 71, 20, 11, 2, 6]])
    with torch.no_grad():
        expected = verifier.generate(prompts, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert torch.equal(draft.generate(prompts, max_new_tokens=30, eos_token_id=[]), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "stablelm", "nemotron", "olmo", "phimoe"])
def test_the_draft_norm_is_initialised_with_the_verifiers_final_norm_scale(name: str, tmp_path: Path) -> None:
    """RMSNorm, 1 + weight, LayerNorm, LayerNorm with 1 + weight, without weights, with a bias."""
    verifier = make(name, tmp_path)
    parts = VerifierParts.of(verifier)
    draft = Eagle3DraftModel.from_training_args(verifier.config)
    draft.attach_verifier(parts)
    draft.borrow_weights()
    weight = getattr(parts.norm, "weight", None)
    expected = torch.ones(32) if weight is None else weight + (1 if name in ("gemma2", "nemotron") else 0)
    torch.testing.assert_close(draft.norm.weight, expected)
    torch.testing.assert_close(norm_scale(parts.norm, 32), expected.detach())


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_the_norm_before_eagles_head_keeps_the_size_of_features(name: str, tmp_path: Path) -> None:
    verifier = make(name, tmp_path)
    draft = EagleSpeculator.from_training_args(verifier.config, layernorms=True)
    draft.attach_verifier(verifier)
    draft.borrow_weights()
    states = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = draft.verifier_parts.norm(states)
        kept = draft.before_head(features)
    assert size(kept) == pytest.approx(size(features), rel=0.2)


def size(states: Tensor) -> float:
    return float(states.square().mean().sqrt())


@pytest.mark.parametrize("name", ["phi", "gptj"])
def test_finishing_products_with_the_heads_matrix_equals_the_head(name: str, tmp_path: Path) -> None:
    """Training multiplies by the matrix itself; decoding calls the head with its bias."""
    parts = VerifierParts.of(make(name, tmp_path))
    assert parts.lm_head.bias is not None and parts.lm_head.bias.any()
    states = torch.randn(4, 32)
    torch.testing.assert_close(parts.finish(states @ parts.lm_head.weight.T), parts.head(states))


def test_the_table_numbers_its_reasons() -> None:
    text = table({"a": Outcome("A", True, {"eagle3": YES, "eagle": "too small"}), "b": Outcome("B", False, {})})
    assert "| a | `A` | one pass | yes | no (1) | no (2) |" in text and "1. too small\n2. there is no draft" in text


def test_every_family_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    missing = [name for name in FAMILIES if f"| {name} |" not in page]
    assert not missing, "regenerate it: python tests/verifier/families.py"
