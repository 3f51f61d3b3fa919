from __future__ import annotations

from typing import Any

import pytest

from specforge.data.chat import read_messages, read_prompt, read_text
from specforge.data.sources import Record
from specforge.errors import UsageError

QUESTION = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def record(**value: Any) -> Record:
    return Record(value, "train.jsonl:7")


def test_sharegpt_turns_become_messages() -> None:
    turns = [
        {"from": "system", "value": "Be kind"},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "user", "value": "Bye"},
        {"from": "bing", "value": "Bye!"},
    ]
    messages = read_messages(record(conversations=turns))
    assert messages is not None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages] == [turn["value"] for turn in turns]


def test_messages_keep_what_templates_read_and_lose_what_datasets_filled_in() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert read_messages(record(messages=[QUESTION, call, {**ANSWER, "tool_calls": None}], text="x")) == [
        QUESTION,
        {"role": "assistant", "tool_calls": [{"name": "add"}]},
        ANSWER,
    ]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "without a usable turn"),
        ([QUESTION], "without a usable turn"),
        ([ANSWER], "without a usable turn"),
        ([QUESTION, {"role": "assistant", "content": "  "}], "without a usable turn"),
        ([QUESTION, {"role": "assistent", "content": "Hello"}], "Did you mean 'assistant'"),
        ([{"from": "humans", "value": "Hi"}, ANSWER], "Did you mean 'human'"),
        (
            [QUESTION, {"role": "assistant", "content": ["Hello"]}],
            "message 1: the content must be a string, found list",
        ),
        ([{"role": "user"}, ANSWER], "message 0: the content must be a string"),
        ("Hi", "a chat is a list"),
        (["Hi"], "a chat is a list"),
    ],
)
def test_bad_chats_are_refused_with_their_place(turns: Any, reason: str) -> None:
    for key in ("messages", "conversations"):
        with pytest.raises(UsageError, match=reason) as refused:
            read_messages(record(**{key: turns}))
        assert str(refused.value).startswith("train.jsonl:7: ")


def test_prompts_and_texts() -> None:
    assert read_messages(record(prompt="a", response="b")) is None
    assert read_prompt(record(prompt="a", response="b")) == ("a", "b")
    assert read_prompt(record(text="a")) is None
    assert read_text(record(text="a")) == "a"


@pytest.mark.parametrize("value", [{"prompt": "a"}, {"prompt": "a", "response": " "}, {"prompt": 1, "response": "b"}])
def test_a_prompt_without_response_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"train.jsonl:7: a row without a usable turn"):
        read_prompt(Record(value, "train.jsonl:7"))


def test_an_unknown_layout_names_keys_and_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"it has \['mesages', 'source'\].* Did you mean 'messages'"):
        read_text(record(source="x", mesages=[]))
    with pytest.raises(UsageError, match="'text' must be a string"):
        read_text(record(text=""))
