"""Small verifiers, and the output of each for a set of prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from random_verifiers import VOCABULARY
from small_models import CONFIGS, CONTEXT, generated, random_model
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def verifier_named() -> Callable[[str], PreTrainedModel]:
    """Small random verifiers by name, each created once; a name may end in the attention implementation to use."""

    @cache
    def named(name: str) -> PreTrainedModel:
        family, _, implementation = name.partition(", ")
        options = {"attn_implementation": implementation} if implementation else {}
        return random_model(CONFIGS[family](), seed=sorted(CONFIGS).index(family), **options)

    return named


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    """Prompts of many lengths: one token, repetition to look up, longer than any window, nearly the full context."""
    generator = torch.Generator().manual_seed(0)
    varied = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in (1, 2, 4, 7, 11)]
    repeated = [3, 4, 5, 6] * 3
    full = torch.randint(1, VOCABULARY, (CONTEXT,), generator=generator).tolist()
    return [tuple(prompt) for prompt in [*varied, repeated, full[:-1], full[:-3]]]


@pytest.fixture(scope="session")
def full_answer(verifier_named: Callable[[str], PreTrainedModel]) -> Callable[[str, tuple[int, ...]], list[int]]:
    """The verifier's own greedy output for a prompt, up to the end of its context."""

    @cache
    def answer(name: str, prompt: tuple[int, ...]) -> list[int]:
        return generated(verifier_named(name), prompt, CONTEXT - len(prompt))

    return answer


@pytest.fixture(scope="session")
def bigram_table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bigram table for the small verifiers' vocabulary."""
    from safetensors.torch import save_file

    path: Path = tmp_path_factory.mktemp("bigram") / "table.safetensors"
    successors = torch.randint(-1, VOCABULARY, (VOCABULARY,), generator=torch.Generator().manual_seed(1))
    save_file({"successors": successors}, path)
    return str(path)
