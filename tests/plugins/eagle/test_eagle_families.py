"""The draft's layer may be of any family: rows that a step does not run still have their keys and values."""

from __future__ import annotations

import pytest
import torch
import transformers
from random_verifiers import fill
from tiny_families import FAMILIES, VOCABULARY

from specforge.documents import DocumentLayout
from specforge.models.chain.ttt_attention import TrainingTimeTest
from specforge.models.draft_rows import DraftRows
from specforge.verifier.parts import VerifierParts
from specforge_eagle.model import EagleSpeculator

LENGTH, COUNT = 9, 4


# With norms before the attention, after it, under another name, and with latent keys.
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "cohere2", "olmo2", "apertus", "deepseek_v3"])
def test_a_layer_run_at_some_rows_sees_the_keys_of_all(name: str) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**{**family.sizes, **family.options})
    draft = EagleSpeculator.from_training_args(config)
    fill(draft, seed=1)
    draft.double().eval()
    width = config.hidden_size
    parts = torch.nn.Embedding(VOCABULARY, width).double(), torch.nn.Identity(), torch.nn.Linear(width, 1)
    draft.attach_verifier(VerifierParts(config, *parts))
    tokens, feature = torch.randint(VOCABULARY, (1, LENGTH)), torch.randn(1, LENGTH, width, dtype=torch.float64)
    supervised = torch.rand(LENGTH).argsort() < COUNT
    documents = DocumentLayout.of(torch.tensor([[0] * 5 + [1] * 4]))
    rows = DraftRows.needed(supervised[None], documents)
    tokens, feature, positions = tokens[:, rows.order], feature[:, rows.order], rows.order[None] % 5

    def run(count: int | None) -> torch.Tensor:
        return draft.advance(tokens, feature, positions, TrainingTimeTest(rows).at(0), count)

    torch.testing.assert_close(run(COUNT), run(None)[:, :COUNT])
