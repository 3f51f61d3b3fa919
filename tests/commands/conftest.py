"""A draft for the quickstart's verifier that knows nothing but the verifier's head: quick to make, poor at drafting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quickstart_prompts import VERIFIER
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specforge.models import Eagle3DraftModel
from specforge.verifier.parts import VerifierParts


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(VERIFIER)
    draft = Eagle3DraftModel.from_training_args(config, verifier_name_or_path=str(VERIFIER), ttt_steps=3)
    draft.attach_verifier(VerifierParts.from_pretrained(str(VERIFIER)))
    draft.borrow_weights()
    folder = tmp_path_factory.mktemp("drafts") / "poor"
    draft.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(VERIFIER)


@pytest.fixture(scope="session")
def reply(tokenizer):
    """What the verifier alone replies greedily to a chat, as transformers generates it."""
    verifier = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)

    def ask(*turns: str, max_new_tokens: int) -> str:
        chat: list[dict[str, str]] = []
        text = ""
        for number, turn in enumerate(turns):
            chat += [{"role": "assistant", "content": text}] if number else []
            chat.append({"role": "user", "content": turn})
            prompt = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
            written = verifier.generate(prompt, do_sample=False, max_new_tokens=max_new_tokens)
            text = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
        return text

    return ask


@pytest.fixture
def write_rows(tmp_path):
    """Write rows to a JSON-lines file."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
