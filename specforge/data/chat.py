"""What a row says: the messages of a chat, checked, from each of the layouts in use."""

from __future__ import annotations

from typing import Any

from specforge.data.sources import Record
from specforge.errors import UsageError, nearest_name

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ROW_KEYS = ("messages", "conversations", "prompt", "text", "input_ids")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "system": "system",
}


def read_messages(record: Record, needs_reply: bool = True) -> list[Message] | None:
    """Return the messages of a `messages` or `conversations` row, or None for a row of another layout.

    Args:
        record: the row; ShareGPT turns (`from`, `value`) come back as `role` and `content`.
        needs_reply: refuse a chat without any reply, which nothing can be learned from.

    Returns:
        Messages as the chat template reads them. Keys beyond `role` and `content`, such as `tool_calls`, are kept.

    Raises:
        UsageError: a message is malformed, or no assistant message that answers something holds text.
    """
    value, location = record.value, record.location
    turns = value.get("messages")
    if turns is None:
        turns = value.get("conversations")
    if turns is None:
        return None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UsageError(f"{location}: a chat is a list of objects such as {{'role': 'user', 'content': 'Hi'}}")
    messages = [_read_message(turn, f"{location}: message {number}") for number, turn in enumerate(turns)]
    replies = (one for one in messages[1:] if one["role"] == "assistant" and one.get("content", "").strip())
    if needs_reply and not any(replies):
        raise UsageError(
            f"{location}: a row without a usable turn: it needs an assistant message with text as an answer"
        )
    return messages


def read_prompt(record: Record) -> tuple[str, str] | None:
    """Return prompt and response of a `prompt` / `response` row, or None for a row of another layout."""
    prompt, response = record.value.get("prompt"), record.value.get("response")
    if prompt is None:
        return None
    if not isinstance(prompt, str) or not isinstance(response, str) or not response.strip():
        raise UsageError(
            f"{record.location}: a row without a usable turn: 'prompt' and 'response' must be strings, the response "
            "not empty"
        )
    return prompt, response


def read_text(record: Record) -> str:
    """Return the text of a `text` row, the last layout that is tried."""
    text = record.value.get("text")
    if text is None:
        keys = sorted(record.value)
        hint = next((hint for key in keys if (hint := nearest_name(key, ROW_KEYS))), "")
        raise UsageError(
            f"{record.location}: a row without a usable turn: it has {keys}, and needs 'messages', 'conversations', "
            f"'prompt' and 'response', 'text', or 'input_ids' and 'loss_mask'.{hint}"
        )
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{record.location}: a row without a usable turn: 'text' must be a string that is not empty")
    return text


def _read_message(turn: Message, location: str) -> Message:
    # datasets fills absent keys with None; templates handle a missing key, but print "None" for a present one.
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, location)
    role = message.get("role")
    if role not in ROLES:
        raise UsageError(f"{location}: role {role!r} is not one of {list(ROLES)}.{nearest_name(str(role), ROLES)}")
    calls_tools = role == "assistant" and "tool_calls" in message and "content" not in message
    if not calls_tools and not isinstance(message.get("content"), str):
        raise UsageError(f"{location}: the content must be a string, found {type(message.get('content')).__name__}")
    return message


def _from_sharegpt(turn: Message, location: str) -> Message:
    speaker = turn["from"]
    if speaker not in _SHAREGPT_ROLES:
        allowed = list(_SHAREGPT_ROLES)
        raise UsageError(
            f"{location}: speaker {speaker!r} is not one of {allowed}.{nearest_name(str(speaker), allowed)}"
        )
    return {"role": _SHAREGPT_ROLES[speaker], "content": turn.get("value")}
