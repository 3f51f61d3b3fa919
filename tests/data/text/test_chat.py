from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from datasets import Dataset

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.chat import Chat, read_chat
from specforge.data.text.records import Record

QUESTION = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
ARGUMENTS = {"city": "Rome", "unit": None}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def record(**value: Any) -> Record:
    return Record(value, "train.jsonl:7")


def read(**value: Any) -> Chat:
    chat = read_chat(record(**value))
    assert isinstance(chat, Chat)
    return chat


def refused(**value: Any) -> BadRow:
    with pytest.raises(BadRow) as error:
        read_chat(record(**value))
    assert str(error.value).startswith("train.jsonl:7: ")
    return error.value


def test_messages_are_read_unchanged() -> None:
    chat = read(messages=[{**QUESTION, "name": "Ann"}, ANSWER], text="x")
    assert chat == Chat([{**QUESTION, "name": "Ann"}, ANSWER], None, (False, True))


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
def test_sharegpt_speakers_become_roles(key: str) -> None:
    roles = {
        "system": "system",
        "human": "user",
        "gpt": "assistant",
        "user": "user",
        "chatgpt": "assistant",
        "Human": "user",
        "bot": "assistant",
        "observation": "tool",
        "model": "assistant",
    }
    turns = [{"from": speaker, "value": speaker} for speaker in roles]
    chat = read(**{key: turns})
    expected = list(roles.values())
    assert [message["role"] for message in chat.messages] == expected
    assert [message["content"] for message in chat.messages] == [turn["value"] for turn in turns]
    assert chat.supervised == tuple(role == "assistant" for role in expected)


def test_sharegpt_calls_and_extra_columns() -> None:
    turns = [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome", "unit": null}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny."},
    ]
    chat = read(conversations=turns, system="Be kind", tools='[{"name": "weather", "description": "w"}]')
    call = {key: value for key, value in CALL.items() if key != "id"}
    assert chat.messages == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Weather in Rome?"},
        {**CALLING, "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    assert chat.tools == [{"type": "function", "function": {"name": "weather", "description": "w"}}]
    assert chat.supervised == (False, False, True, False, True)
    assert read(messages=[{"role": "system", "content": "Own"}, QUESTION, ANSWER], system="x").messages[0] == {
        "role": "system",
        "content": "Own",
    }


@pytest.mark.parametrize(
    "calls",
    [
        [{**CALL, "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}],
        [{"id": "c1", "name": "weather", "arguments": json.dumps(ARGUMENTS)}],
        [{"id": "c1", "name": "weather", "parameters": json.dumps(ARGUMENTS)}],
        [json.dumps(CALL)],
        json.dumps([CALL]),
    ],
)
def test_calls_are_normalised_and_nulls_in_json_strings_are_kept(calls: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    chat = read(messages=[QUESTION, call])
    assert chat.messages[1] == CALLING
    assert json.dumps(chat.messages[1]["tool_calls"]) == json.dumps([CALL])
    assert chat.supervised == (False, True)
    assert read(messages=[QUESTION, {"role": "assistant", "tool_calls": calls}]) == chat


@pytest.mark.parametrize(
    ("arguments", "expected"), [("", {}), (None, {}), ({}, {}), ("[1]", "[1]"), ("{cut", "{cut"), ([1], [1])]
)
def test_arguments_that_are_not_objects_are_kept(arguments: Any, expected: Any) -> None:
    call = {"function": {"name": "weather", "arguments": arguments}}
    (read_call,) = read(messages=[QUESTION, {**ANSWER, "tool_calls": [call]}]).messages[1]["tool_calls"]
    assert read_call["function"]["arguments"] == expected


def test_the_function_call_form_before_tool_calls() -> None:
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    turns = [QUESTION, {"role": "assistant", "content": None, "function_call": call}]
    turns += [{"role": "function", "name": "weather", "content": "sunny"}, ANSWER]
    chat = read(messages=turns, functions=[{"name": "weather", "parameters": SCHEMA}])
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert chat.messages[2] == {"role": "tool", "name": "weather", "content": "sunny"}
    assert chat.tools == [TOOL]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [{"name": "weather", "parameters": SCHEMA}],
        [{"name": "weather", "parameters": json.dumps(SCHEMA)}],
        [{**TOOL, "function": {**TOOL["function"], "strict": None, "parameters": {**SCHEMA, "required": None}}}],
    ],
)
def test_tools_are_normalised(tools: Any) -> None:
    assert read(messages=[QUESTION, ANSWER], tools=tools).tools == [TOOL]


def test_a_bare_function_keeps_all_its_keys() -> None:
    function = {"name": "weather", "return": {"type": "string"}}
    tools = read(messages=[QUESTION, ANSWER], tools=[{"type": "function", **function}]).tools
    assert tools == [{"type": "function", "function": function}]


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_missing_tools_are_none(tools: Any) -> None:
    assert read(messages=[QUESTION, ANSWER], tools=tools).tools is None


def test_nulls_filled_in_by_arrow_are_dropped_at_every_depth() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows: list[dict[str, Any]] = [
        {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        {"messages": [QUESTION, {**ANSWER, "weight": 1}, QUESTION, {"role": "assistant", "tool_calls": [call]}]},
    ]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}}}}]
    first, second = (read(**row) for row in Dataset.from_list(rows))
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert first.tools == [TOOL]
    assert second.messages == [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert second.tools == rows[1]["tools"]


def test_text_parts_are_joined_and_other_types_refused() -> None:
    parts = [{"type": "text", "text": "Hel", "image_url": None}, {"type": "text", "text": "lo"}]
    assert read(messages=[QUESTION, {"role": "assistant", "content": parts}]).messages == [QUESTION, ANSWER]
    seen = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}, parts[0]]}
    error = refused(messages=[seen, ANSWER])
    assert error.reason == "content part image_url"
    assert "message 0: a content part of type 'image_url'" in str(error)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_normalised_to_one_key(key: str) -> None:
    chat = read(messages=[{**QUESTION, key: None}, {**ANSWER, key: "Hm."}, QUESTION, {**ANSWER, key: ""}])
    assert chat.messages == [QUESTION, {**ANSWER, "reasoning_content": "Hm."}, QUESTION, ANSWER]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"masked": True}])
def test_a_turn_marked_as_excluded_is_not_trained_on(mark: dict[str, Any]) -> None:
    (key, value), *_ = mark.items()
    chat = read(messages=[QUESTION, {**ANSWER, **mark}, {**QUESTION, **mark}, {**ANSWER, key: not value}])
    assert chat.messages == [QUESTION, ANSWER, QUESTION, ANSWER]
    assert chat.supervised == (False, False, False, True)
    assert refused(messages=[QUESTION, {**ANSWER, **mark}]).reason == "no reply to train on"


def test_a_greeting_and_an_empty_reply_are_not_supervised() -> None:
    empty = {"role": "assistant", "content": " "}
    assert read(messages=[ANSWER, QUESTION, empty, QUESTION, ANSWER]).supervised == (False, False, False, False, True)


@pytest.mark.parametrize("key", ["response", "completion"])
def test_a_prompt_and_its_reply(key: str) -> None:
    chat = read(**{"prompt": "Hi", key: "Hello", "chosen": None})
    assert chat == Chat([QUESTION, ANSWER], None, (False, True), texts=("Hi", "Hello"))
    system = {"role": "system", "content": "Be kind"}
    assert read(**{"prompt": "Hi", key: "Hello", "system": "Be kind"}) == Chat(
        [system, QUESTION, ANSWER], None, (False, False, True)
    )


def test_replies_in_a_prompt_of_messages_are_context() -> None:
    chat = read(prompt=[QUESTION, ANSWER, QUESTION], completion=[ANSWER], tools=[TOOL])
    assert chat == Chat([QUESTION, ANSWER] * 2, [TOOL], (False, False, False, True))
    assert read(prompt=[QUESTION], completion="Hello") == Chat([QUESTION, ANSWER], None, (False, True))


def test_instructions_with_input_and_history() -> None:
    plain = read(instruction="Add.", input="1 2", output="3", text="a render")
    assert plain.messages == [{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}]
    assert plain.texts == ("Add.\n1 2", "3")
    assert read(instruction="Hi", input="", output="Hello").texts == ("Hi", "Hello")
    earlier = read(instruction="Hi", output="Hello", history=[["Hi", "Hello"]], system="Be kind")
    assert earlier.messages == [{"role": "system", "content": "Be kind"}, QUESTION, ANSWER, QUESTION, ANSWER]
    assert earlier.supervised == (False, False, True, False, True)


def test_text_is_returned_unchanged() -> None:
    assert read_chat(record(text="a", prompt="b", messages=None)) == "a"


@pytest.mark.parametrize(
    ("turns", "reason", "shown"),
    [
        ([], "no messages", "holds no messages"),
        ([QUESTION], "no reply", "without a usable turn"),
        ([ANSWER], "no reply", "without a usable turn"),
        ([{"role": "system", "content": "x"}], "no reply", "without a usable turn"),
        ([QUESTION, {"role": "assistant", "content": "  "}], "no reply", "without a usable turn"),
        ([QUESTION, {"role": "assistent", "content": "Hello"}], "unknown role", "Did you mean 'assistant'"),
        ([{"from": "humans", "value": "Hi"}, ANSWER], "unknown role", "Did you mean 'human'"),
        ([QUESTION, {"role": ["assistant"], "content": "Hello"}], "unknown role", "message 1: role ['assistant']"),
        ([QUESTION, {"content": "Hello"}], "unknown role", "message 1: speaker None"),
        ([{"role": "user", "content": {"a": 1}}, ANSWER], "malformed content", "found dict"),
        ([{"role": "user", "content": [7]}, ANSWER], "content part int", "'int'"),
        ([{"role": "user"}, ANSWER], "no content", "message 0: it has no content"),
        ([QUESTION, {**ANSWER, "weight": "0"}], "malformed weight", "found '0'"),
        ([QUESTION, {**ANSWER, "thinking": ["x"]}], "malformed thinking", "found list"),
        ([QUESTION, {**ANSWER, "tool_calls": 3}], "malformed tool call", "found int"),
        ([QUESTION, {**ANSWER, "tool_calls": [{"arguments": {}}]}], "malformed tool call", "message 1"),
        ([QUESTION, {"from": "function_call", "value": "{}"}], "malformed tool call", "message 1"),
        ([QUESTION, {"from": "function_call", "value": "no JSON"}], "malformed tool call", "not JSON"),
        ("Hi", "malformed messages", "must be a list"),
        (["Hi"], "malformed message", "message 0"),
    ],
)
def test_bad_chats_are_refused_with_their_position_and_a_reason(turns: Any, reason: str, shown: str) -> None:
    error = refused(messages=turns)
    assert error.reason == reason
    assert shown in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "no reply"),
        ({"prompt": [QUESTION]}, "no reply"),
        ({"prompt": "a", "response": " "}, "empty response"),
        ({"prompt": 1, "response": "b"}, "malformed prompt"),
        ({"prompt": [], "completion": [ANSWER]}, "no messages"),
        ({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]}, "preference pair"),
        ({"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, "preference pair"),
        ({"instruction": "a", "output": ""}, "empty output"),
        ({"instruction": "a"}, "malformed output"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "malformed history"),
        ({"instruction": "a", "output": "b", "input": 3}, "malformed input"),
        ({"text": ""}, "empty text"),
        ({"text": ["a"]}, "malformed text"),
        ({"messages": [QUESTION, ANSWER], "tools": 3}, "malformed tools"),
        ({"messages": [QUESTION, ANSWER], "tools": "[{}]"}, "malformed tools"),
        ({}, "unknown form"),
    ],
)
def test_other_bad_rows_are_refused(row: dict[str, Any], reason: str) -> None:
    assert refused(**row).reason == reason


def test_values_nested_too_deeply_are_one_reason() -> None:
    calls: list[Any] = []
    for _ in range(20_000):
        calls = [calls]
    assert refused(messages=[QUESTION, {**ANSWER, "tool_calls": calls}]).reason == "nested too deeply"


def test_an_unknown_form_names_its_keys_and_the_nearest_known_one() -> None:
    error = refused(source="x", mesages=[])
    assert "it has ['mesages', 'source']" in str(error)
    assert "Did you mean 'messages'" in str(error)
