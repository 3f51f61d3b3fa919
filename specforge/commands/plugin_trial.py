"""A draft on trial: freshly trained on a tiny random verifier, in float64, with what ``unroll`` computes over texts.

Letters in shapes: T tokens, S draft steps, H width of states, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specforge.errors import SpecforgeError
from specforge.hookspecs import Algorithm
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.features import Features, capture

# Enough tokens and layers for the defaults of the algorithms in this repository.
VOCABULARY, LAYERS, WIDTH = 32768, 8, 32
LENGTH, STEPS = 24, 4
# In float64; an off-by-one index causes far larger differences.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Trial:
    """A draft after two steps of training, in float64, attached to its verifier.

    Attributes:
        algorithm: Its algorithm.
        draft: The draft.
        verifier: The verifier.
        tokens: A text, int64 [T].
    """

    algorithm: Algorithm
    draft: SpeculatorModel
    verifier: LlamaForCausalLM
    tokens: Tensor

    @property
    def steps(self) -> int:
        """Number of draft steps to check."""
        return min(STEPS, self.draft.drafter(1).max_depth or STEPS)

    @torch.no_grad()
    def features(self, tokens: Tensor) -> Features:
        """Return the verifier's states over a text [T], [1, T, ...]."""
        return capture(self.verifier, tokens[None], torch.arange(len(tokens))[None], self.draft.aux_layers)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """Return what ``unroll`` computes over a text [T], [S, T, H]."""
        positions = torch.arange(len(tokens))[None]
        documents = torch.zeros_like(positions)
        hidden = self.draft.unroll(tokens[None], self.features(tokens), positions, documents, self.steps)
        if hidden.shape[:3] != (self.steps, 1, len(tokens)):
            expected = f"[{self.steps}, 1, {len(tokens)}, H]"
            raise SpecforgeError(f"unroll returns {list(hidden.shape)}, but must return {expected}")
        return hidden[:, 0]

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> list[Tensor]:
        """Return the logits of ``unroll`` over a text [T], [T, D] for each step."""
        return [self.draft.logits(states, step) for step, states in enumerate(self.states(tokens))]


def write_verifier(folder: Path) -> LlamaForCausalLM:
    """Write a random Llama, and return it in float64."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        initializer_range=0.3,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        **heads,
    )
    verifier = LlamaForCausalLM(config)
    verifier.save_pretrained(folder)
    return verifier.double().eval().requires_grad_(False)


def difference(found: Tensor, expected: Tensor) -> str | None:
    """Return how some logits differ from the expected ones by more than rounding, or None."""
    if found.shape != expected.shape:
        return f"logits are {list(found.shape)}, but must be {list(expected.shape)}"
    # Tokens that a draft rules out have minus infinity on both sides.
    off = torch.where(found == expected, 0.0, (found - expected).abs())
    furthest = float(off.max())
    allowed = TOLERANCE * max(1.0, float(expected[expected.isfinite()].abs().max()))
    return None if furthest <= allowed else f"logits are up to {furthest:.3g} off, {allowed:.1g} is allowed"
