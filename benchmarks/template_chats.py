"""Conversations in published forms, one for each known fault of chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
Row = dict[str, Any]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_weather",
            "description": "Weather of a town",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "Its name"}, "days": {"type": "integer"}},
                "required": ["town"],
            },
        },
    }
]
ARGUMENTS = {"town": "Zürich", "days": 3}
THOUGHT = "Seven times eight is fifty-six."


def user(content: Any = "What is seven times eight?") -> Message:
    """A question."""
    return {"role": "user", "content": content}


def reply(content: Any = "The product is 56.", **keys: Any) -> Message:
    """A reply; further keys are those of an OpenAI message."""
    return {"role": "assistant", "content": content, **keys}


def call(arguments: Any = ARGUMENTS, content: Any = None, number: int = 1) -> Message:
    """A reply that calls a tool, `number` times."""
    calls = [
        {"id": f"callnr{index:03}", "type": "function", "function": {"name": "find_weather", "arguments": arguments}}
        for index in range(number)
    ]
    return reply(content, tool_calls=calls)


def result(content: str = '{"sky": "clear"}', number: int = 0) -> Message:
    """The tool's answer."""
    return {"role": "tool", "tool_call_id": f"callnr{number:03}", "name": "find_weather", "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    """Text as a list of parts."""
    return [{"type": "text", "text": text} for text in texts]


def instruction(role: str) -> Message:
    """A system or developer message."""
    return {"role": role, "content": "Answer in one short sentence."}


_WEATHER, _AFTER = user("How is the sky over Zürich?"), reply("The sky there is clear.")
_SECOND = [user("And nine times nine?"), reply("That makes 81.")]
_INLINE = f"<think>\n{THOUGHT}\n</think>\n\nThe product is 56."
_WIRE = json.dumps(ARGUMENTS, ensure_ascii=False)

CHATS: Mapping[str, list[Message]] = {
    "one turn": [user(), reply()],
    "two turns": [user(), reply(), *_SECOND],
    "three turns": [user(), reply(), *_SECOND, user("And ten times ten?"), reply("A hundred.")],
    "system": [instruction("system"), user(), reply()],
    "system, two turns": [instruction("system"), user(), reply(), *_SECOND],
    "developer": [instruction("developer"), user(), reply()],
    "greeting first": [reply("Welcome, ask me."), user(), reply()],
    "two replies in a row": [user(), reply("Let me compute."), reply()],
    "two questions in a row": [user("I have a question."), user(), reply()],
    "ends with a question": [user(), reply(), user("And nine times nine?")],
    "blanks around": [user(" What?\n"), reply("  The product is 56. \n\n")],
    "blanks around, two turns": [user(), reply("The product is 56.\n\n"), *_SECOND],
    "unicode": [user("Grüße, 你好?"), reply("Schön 👋🏽 — ça va… 你好！")],
    "code and newlines": [user(), reply("```python\nprint(56)\n\n\n```\n\n- one\n- two")],
    "content in parts": [user(parts("What is seven ", "times eight?")), reply(parts("The product", " is 56."))],
    "content in parts, two turns": [user(parts("What?")), reply(parts("The product is 56.")), *_SECOND],
    "empty reply": [user(), reply("")],
    "empty reply, then one": [user(), reply(""), *_SECOND],
    "thinking inline": [user(), reply(_INLINE)],
    "thinking inline, two turns": [user(), reply(_INLINE), *_SECOND],
    "thinking by key": [user(), reply(reasoning_content=THOUGHT)],
    "thinking by key, two turns": [user(), reply(reasoning_content=THOUGHT), *_SECOND],
    "thinking by key, twice": [
        user(),
        reply(reasoning_content=THOUGHT),
        _SECOND[0],
        reply("That makes 81.", reasoning_content="Nine nines are eighty-one."),
    ],
    "call, object, content null": [_WEATHER, call(), result(), _AFTER],
    "call, string, content null": [_WEATHER, call(_WIRE), result(), _AFTER],
    "call, string, content empty": [_WEATHER, call(_WIRE, ""), result(), _AFTER],
    "call, object, with content": [_WEATHER, call(content="I look it up."), result(), _AFTER],
    "call, string, with content": [_WEATHER, call(_WIRE, "I look it up."), result(), _AFTER],
    "call last, object": [_WEATHER, call()],
    "call last, string": [_WEATHER, call(_WIRE)],
    "two calls, string": [_WEATHER, call(_WIRE, number=2), result(), result('{"sky": "grey"}', 1), _AFTER],
    "call, then a second turn": [instruction("system"), _WEATHER, call(_WIRE), result(), _AFTER, *_SECOND],
}


def row(name: str) -> Row:
    """Return a conversation as a row of a data set, with tools if it calls one."""
    chat = CHATS[name]
    return {"messages": chat} | ({"tools": TOOLS} if any("tool_calls" in message for message in chat) else {})
