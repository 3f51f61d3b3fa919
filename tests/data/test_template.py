from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from specforge.data.template import ChatRenderer, SupervisedText
from specforge.errors import UsageError

Load = Callable[..., PreTrainedTokenizerBase]
Chat = Callable[..., dict[str, Any]]


def supervised(rendered: SupervisedText) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize("name", ["chatml", "generation"])
def test_each_response_with_its_closing_token_is_supervised(
    load_tokenizer: Load, templates: dict[str, str], chat: Chat, name: str
) -> None:
    messages = chat("one", "two", "three", "four \n")["messages"]
    rendered = ChatRenderer(load_tokenizer(templates[name])).render(messages, None, "here")
    assert supervised(rendered) == ["two<|im_end|>", "four \n<|im_end|>"]
    assert rendered.text.endswith("four \n<|im_end|>\n")
    assert not rendered.add_special_tokens


def test_without_a_closing_token_the_response_reaches_to_its_end(load_tokenizer: Load, chat: Chat) -> None:
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    rendered = ChatRenderer(load_tokenizer(template)).render(chat("one", "two")["messages"], None, "here")
    assert supervised(rendered) == ["two\n"]


def test_a_greeting_before_any_question_is_context(load_tokenizer: Load, templates: dict[str, str]) -> None:
    messages = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "Hi"}]
    messages.append({"role": "assistant", "content": "Hello"})
    rendered = ChatRenderer(load_tokenizer(templates["chatml"])).render(messages, None, "here")
    assert supervised(rendered) == ["Hello<|im_end|>"]
    assert "Welcome" in rendered.text


def test_prefixes_that_do_not_hold_are_refused(load_tokenizer: Load, templates: dict[str, str], chat: Chat) -> None:
    renderer = ChatRenderer(load_tokenizer(templates["strips_thinking"]))
    thinking = chat("one", "<think>so</think>two", "three", "four")["messages"]
    with pytest.raises(UsageError, match=r"^train.jsonl:3: message 1: .*prefixes do not hold") as refused:
        renderer.render(thinking, None, "train.jsonl:3")
    assert "goes on '<think>so</think>two<|im_end|>', the longer one 'two<|im_end|>" in str(refused.value)
    assert "{% generation %}" in str(refused.value)
    assert supervised(renderer.render(thinking[:2], None, "here")) == ["<think>so</think>two<|im_end|>"]


def test_a_generation_prompt_that_the_answer_lacks_is_refused(load_tokenizer: Load, templates: dict[str, str]) -> None:
    template = templates["chatml"].replace(
        "<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif"
    )
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    with pytest.raises(UsageError, match="prefixes do not hold"):
        ChatRenderer(load_tokenizer(template)).render(messages, None, "here")


def test_a_template_that_raises_is_named_with_the_row(load_tokenizer: Load, chat: Chat) -> None:
    renderer = ChatRenderer(load_tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UsageError, match=r"train.jsonl:3: the chat template refuses this chat: roles must alternate"):
        renderer.render(chat("one", "two")["messages"], None, "train.jsonl:3")


def test_no_template_is_named(load_tokenizer: Load, chat: Chat) -> None:
    with pytest.raises(UsageError, match=r"train.jsonl:3: .* no chat template"):
        ChatRenderer(load_tokenizer(None)).render(chat("one", "two")["messages"], None, "train.jsonl:3")


def test_tools_reach_the_template(load_tokenizer: Load, templates: dict[str, str], chat: Chat) -> None:
    template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + templates["chatml"]
    rendered = ChatRenderer(load_tokenizer(template)).render(chat("one", "two")["messages"], [{"name": "add"}], "here")
    assert rendered.text.startswith("add<|im_start|>user")
    assert supervised(rendered) == ["two<|im_end|>"]
