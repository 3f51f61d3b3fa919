"""Tiny real verifier folders: a byte-level tokenizer with a chat template, and a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPS_THINKING = CHATML.replace(
    "message['content'] +",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1]) +",
)
CORPUS = ["the user asks and the assistant answers", "one two three four five six seven eight nine ten"] * 4
VOCABULARY_SIZE = 320


def train_tokenizer(trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "    indented", "\n\n\n"], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_verifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a folder with config.json and, by default, a tokenizer; return the folder."""

    def make(template: str | None = CHATML, trim_offsets: bool = False, tokenizer: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("verifier")
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE, hidden_size=16, num_attention_heads=2, num_hidden_layers=1
        ).save_pretrained(folder)
        if tokenizer:
            fast = PreTrainedTokenizerFast(
                tokenizer_object=train_tokenizer(trim_offsets), eos_token="<|im_end|>", bos_token="<|im_start|>"
            )
            fast.chat_template = template
            fast.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def verifier(make_verifier: Callable[..., Path]) -> Path:
    return make_verifier()


@pytest.fixture(scope="session")
def load_tokenizer(make_verifier: Callable[..., Path]) -> Callable[..., PreTrainedTokenizerBase]:
    """Return a tokenizer with a chat template, loaded from a folder."""
    return lambda *arguments, **options: AutoTokenizer.from_pretrained(make_verifier(*arguments, **options))


@pytest.fixture(scope="session")
def tokenizer(verifier: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(verifier)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPECFORGE_CACHE", str(tmp_path / "cache"))
    yield


@pytest.fixture(scope="session")
def chat() -> Callable[..., dict[str, Any]]:
    """Return rows of alternating user and assistant messages."""
    roles = ("user", "assistant")
    return lambda *contents: {
        "messages": [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    }


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return {"chatml": CHATML, "generation": GENERATION, "strips_thinking": STRIPS_THINKING}
