"""Plain folders of transformers: written, read by transformers and by us, distinguished from other drafts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_models import ROUNDED, random_draft
from random_verifiers import random_rows
from transformers import AutoModelForCausalLM, PreTrainedModel

from specforge.checkpoints.formats import layout_in, layout_of
from specforge.checkpoints.layout import StoredDraft
from specforge.config import VerifierConfig
from specforge.models.storage import write_checkpoint

VerifierOf = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_transformers_and_we_read_what_is_written(family: str, verifier_of: VerifierOf, tmp_path: Path) -> None:
    draft = random_draft(verifier_of("llama"), family)
    layout = layout_of("draft_model", "transformers")
    stored = layout.write(draft)
    write_checkpoint(tmp_path, stored.config, stored.tensors)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and plain.dtype == torch.float64
    tokens, _ = random_rows(2, 9)
    expected = draft.logits(draft.advance(tokens, torch.arange(9).expand(2, -1)))
    torch.testing.assert_close(plain(tokens).logits, expected, **ROUNDED)
    # Folders written by transformers are read as well.
    plain.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        found = StoredDraft.read(folder)
        assert layout_in(found).format == layout.format
        read = layout.read(found, VerifierConfig(name_or_path="x"))
        state = read.state_dict()
        assert state.keys() == draft.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in draft.state_dict().items())
        assert read.config.speculators_config is not None
        assert read.config.speculators_config.verifier.name_or_path == "x"


def test_a_tied_head_may_be_stored_twice(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), "qwen3")
    layout = layout_of("draft_model", "transformers")
    stored = layout.write(draft)
    stored.tensors["lm_head.weight"] = stored.tensors["model.embed_tokens.weight"].clone()
    assert torch.equal(layout.read(stored, VerifierConfig()).head_weights, draft.head_weights)
    stored.tensors["lm_head.weight"] += 1
    with pytest.raises(Exception, match=r"unknown: language_model\.lm_head\.weight"):
        layout.read(stored, VerifierConfig())


@pytest.mark.parametrize(
    "changes",
    [
        {"speculators_model_type": "eagle3"},
        {"architectures": ["LlamaForCausalLMEagle3"]},
        {"model_type": "t5"},
    ],
)
def test_other_drafts_are_not_mistaken_for_language_models(changes: dict[str, Any], verifier_of: VerifierOf) -> None:
    layout = layout_of("draft_model", "transformers")
    stored = layout.write(random_draft(verifier_of("llama"), "llama"))
    assert layout.recognises(stored) and not layout.recognises(StoredDraft(stored.config | changes, stored.tensors))
    # Published heads name the verifier's class, and have only layers.
    inner = {name.removeprefix("model."): tensor for name, tensor in stored.tensors.items()}
    assert not layout.recognises(StoredDraft(stored.config, inner))
