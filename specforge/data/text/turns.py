"""One turn of a conversation, normalised to the message form that chat templates read."""

from __future__ import annotations

from typing import Any

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.tool_calls import read_tool_calls, without_nulls
from specforge.errors import nearest_name

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_FUNCTION_CALL = "function_call"
_SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": _FUNCTION_CALL,
    "tool_call": _FUNCTION_CALL,
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys that state whether a turn is trained on, with the value that means it is not.
_TRAINING_KEYS = {"weight": False, "loss": False, "train": False, "training": False, "masked": True}
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_turn(turn: Any, location: str, number: int) -> tuple[Message, bool]:
    """Read one turn.

    Args:
        turn: The row's value: ``role`` and ``content``, or ShareGPT's ``from`` and ``value``.
        location: Location of the row.
        number: Index of the turn, from 0.

    Returns:
        The message, and whether it is a reply to train on: an assistant message with text, thinking or tool calls that
        is not marked as excluded from training.

        The message has ``role``, one of ``ROLES``, and ``content``, a string (empty if there are only tool calls).
        ``tool_calls`` has the form of ``read_tool_calls``; thinking outside the content is in ``reasoning_content``.
        Both keys are absent if empty. Other keys are kept, null values dropped.

    Raises:
        BadRow: The turn is malformed.
    """
    where = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRow(
            location,
            "malformed message",
            f"{where}: a message is an object such as {{'role': 'user', 'content': 'Hi'}}, found {type(turn).__name__}",
        )
    message = without_nulls(turn)
    role = _pop_role(message, location, where)
    content = message.pop("content") if "content" in message else message.pop("value", None)
    function_call = message.pop("function_call", None)  # the API's form before tool_calls
    called = message.pop("tool_calls", None) or function_call
    if role == _FUNCTION_CALL:
        role, called, content = "assistant", called or content or {}, ""
    calls = read_tool_calls(called, location, where) if called not in (None, "", []) else []
    is_trained = _pop_trained_on(message, location, where)
    reasoning = _pop_reasoning(message, location, where)
    if content is None and (calls or role == "tool" or reasoning):
        content = ""
    normal: Message = {"role": role, "content": _read_content(content, location, where)}
    if reasoning:
        normal["reasoning_content"] = reasoning
    if calls:
        normal["tool_calls"] = calls
    return {**normal, **message}, is_trained and is_reply(normal)


def is_reply(message: Message) -> bool:
    """Return whether a message is an assistant message with text, thinking or tool calls."""
    has_output = message["content"].strip() or "reasoning_content" in message or "tool_calls" in message
    return bool(message["role"] == "assistant" and has_output)


def _pop_role(message: Message, location: str, where: str) -> str:
    """Remove and return the role of a message."""
    key = "role" if "role" in message else "from"
    speaker = message.pop(key, None)
    role = _SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        name = "role" if key == "role" else "speaker"
        raise BadRow(
            location,
            "unknown role",
            f"{where}: {name} {speaker!r:.80} is not one of {list(_SPEAKERS)}.{nearest_name(str(speaker), _SPEAKERS)}",
        )
    return role


def _pop_trained_on(message: Message, location: str, where: str) -> bool:
    """Remove the keys that state whether a message is trained on, and return whether it is."""
    trained_on = True
    for key in sorted(_TRAINING_KEYS.keys() & message):
        value = message.pop(key)
        if not isinstance(value, bool | int | float):
            raise BadRow(
                location, f"malformed {key}", f"{where}: {key!r} must be true, false or a number, found {value!r:.80}"
            )
        trained_on = trained_on and bool(value) != _TRAINING_KEYS[key]
    return trained_on


def _pop_reasoning(message: Message, location: str, where: str) -> str:
    """Remove and return the thinking of a message, under any of its keys."""
    reasoning = ""
    for key in _REASONING_KEYS:
        value = message.pop(key, "")
        if not isinstance(value, str):
            found = type(value).__name__
            raise BadRow(location, f"malformed {key}", f"{where}: {key!r} must be a string, found {found}")
        reasoning = reasoning or value
    return reasoning


def _read_content(content: Any, location: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_read_part(part, location, where) for part in content)
    if content is None:
        raise BadRow(location, "no content", f"{where}: it has no content")
    raise BadRow(
        location,
        "malformed content",
        f"{where}: the content must be a string or a list of parts, found {type(content).__name__}",
    )


def _read_part(part: Any, location: str, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            return str(part["text"])
        shown = kind if isinstance(kind, str) else type(kind).__name__
    else:
        shown = type(part).__name__
    raise BadRow(
        location,
        f"content part {shown:.40}" if shown.isprintable() else "content part",
        f"{where}: a content part of type {shown!r:.80} cannot be read; parts are {{'type': 'text', 'text': ...}}",
    )
