"""Reading a row as a conversation in one normal form, from each published form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.records import Record
from specforge.data.text.tool_calls import parsed, read_tools
from specforge.data.text.turns import Message, is_reply, read_turn
from specforge.errors import nearest_name

__all__ = ["CHAT_KEYS", "Chat", "Message", "read_chat"]

CHAT_KEYS = ("messages", "conversations", "conversation")
_REPLY_KEYS = ("response", "completion")
_ROW_KEYS = (*CHAT_KEYS, "prompt", *_REPLY_KEYS, "instruction", "output", "text", "input_ids", "loss_mask")
_FORMS = (
    "'messages', 'conversations', 'prompt' and 'response' or 'completion', 'instruction' and 'output', 'text', or "
    "'input_ids' and 'loss_mask'"
)
_UNUSABLE = "a row without a usable turn"


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in its normal form.

    Attributes:
        messages: Messages as ``specforge.data.text.turns.read_turn`` returns them.
        tools: Function-wrapped tool descriptions for the template; None if there are none.
        supervised: Whether each message is a reply to train on. Never True for the first one, which answers nothing.
        texts: Prompt and reply of a row that gave two plain texts, which are concatenated if the tokenizer has no chat
            template. None for other rows.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    supervised: tuple[bool, ...]
    texts: tuple[str, str] | None = None


def read_chat(record: Record, needs_reply: bool = True) -> Chat | str:
    """Return the conversation of a row, or the text of a ``text`` row.

    Args:
        record: A row of any form except ``input_ids`` and ``loss_mask``.
        needs_reply: Whether to refuse a conversation without a reply to train on.

    Raises:
        BadRow: The row is malformed or has an unknown form.
    """
    try:
        chat = _read(record)
    except RecursionError:
        raise BadRow(record.location, "nested too deeply", "the row's values are nested too deeply") from None
    if isinstance(chat, Chat) and needs_reply and not any(chat.supervised):
        raise _without_reply(chat, record.value, record.location)
    return chat


def _read(record: Record) -> Chat | str:
    row, location = record.value, record.location
    for key in CHAT_KEYS:
        if row.get(key) is not None:
            return _from_turns(_turn_list(row[key], key, location), row, location)
    reply_key = next((key for key in _REPLY_KEYS if row.get(key) is not None), None)
    if row.get("prompt") is not None and (reply_key or isinstance(row["prompt"], list)):
        return _from_prompt(row, reply_key, location)
    if row.get("instruction") is not None:
        return _from_instruction(row, location)
    if row.get("text") is not None:
        return _read_text(row["text"], "text", location)
    raise _unknown_form(row, location)


def _turn_list(value: Any, key: str, location: str) -> list[Any]:
    turns = parsed(value)
    if not isinstance(turns, list):
        raise BadRow(
            location,
            f"malformed {key}",
            f"{key!r} must be a list of objects such as {{'role': 'user', 'content': 'Hi'}}, found "
            f"{type(turns).__name__}",
        )
    if not turns:
        raise BadRow(location, "no messages", f"{key!r} holds no messages")
    return turns


def _from_turns(turns: list[Any], row: dict[str, Any], location: str, context: int = 0) -> Chat:
    """Return the chat of some turns; the first ``context`` turns are not trained on."""
    read = [read_turn(turn, location, number) for number, turn in enumerate(turns)]
    messages = [message for message, _ in read]
    supervised = [is_trained and number >= max(context, 1) for number, (_, is_trained) in enumerate(read)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] not in ("system", "developer"):
        messages, supervised = [{"role": "system", "content": system}, *messages], [False, *supervised]
    tools = row.get("tools") if row.get("tools") is not None else row.get("functions")
    return Chat(messages, read_tools(tools, location), tuple(supervised))


def _from_prompt(row: dict[str, Any], reply_key: str | None, location: str) -> Chat:
    prompt, reply = row["prompt"], row[reply_key] if reply_key else []
    asked = prompt if isinstance(prompt, list) else [_user(_read_text(prompt, "prompt", location))]
    answered = reply if isinstance(reply, list) else [_assistant(_read_text(reply, str(reply_key), location))]
    if not asked or (reply_key and not answered):
        raise BadRow(location, "no messages", f"'prompt' or {reply_key!r} holds no messages")
    chat = _from_turns([*asked, *answered], row, location, context=len(asked))
    if isinstance(prompt, str) and isinstance(reply, str) and len(chat.messages) == 2:
        return replace(chat, texts=(prompt, reply))
    return chat


def _from_instruction(row: dict[str, Any], location: str) -> Chat:
    """Read an Alpaca row; ``history`` holds earlier pairs of instruction and output."""
    instruction = _read_text(row["instruction"], "instruction", location)
    key = next((key for key in ("output", *_REPLY_KEYS) if row.get(key) is not None), "output")
    output = _read_text(row.get(key), key, location)
    history, turns = row.get("history") or [], []
    if not isinstance(history, list):
        raise BadRow(location, "malformed history", "'history' must be a list of pairs of instruction and output")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(location, "malformed history", f"'history' must hold pairs of texts, found {pair!r:.80}")
        turns += [_user(pair[0]), _assistant(pair[1])]
    given = next((row[key] for key in ("input", "context") if row.get(key)), "")
    if not isinstance(given, str):
        raise BadRow(location, "malformed input", f"'input' must be a string, found {type(given).__name__}")
    prompt = f"{instruction}\n{given}" if given.strip() else instruction
    chat = _from_turns([*turns, _user(prompt), _assistant(output)], row, location)
    return replace(chat, texts=(prompt, output)) if len(chat.messages) == 2 else chat


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> Message:
    return {"role": "assistant", "content": content}


def _read_text(value: Any, key: str, location: str) -> str:
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise BadRow(location, f"malformed {key}", f"{key!r} must be a string, found {found}")
    if not value.strip():
        raise BadRow(location, f"empty {key}", f"{key!r} is empty")
    return value


def _without_reply(chat: Chat, row: dict[str, Any], location: str) -> BadRow:
    if row.get("chosen") is not None:
        return _preference_pair(location)
    if any(is_reply(message) for message in chat.messages[1:]):
        return BadRow(location, "no reply to train on", "every reply in it is marked as not to be trained on")
    return BadRow(
        location,
        "no reply",
        f"{_UNUSABLE}: it needs an assistant message with text or tool calls after a prompt",
    )


def _unknown_form(row: dict[str, Any], location: str) -> BadRow:
    if row.get("chosen") is not None:
        return _preference_pair(location)
    if row.get("prompt") is not None:
        return BadRow(location, "no reply", f"{_UNUSABLE}: a 'prompt' needs a 'response' or 'completion'")
    keys = sorted(map(str, row))
    hint = next((hint for key in keys if (hint := nearest_name(key, _ROW_KEYS))), "")
    return BadRow(location, "unknown form", f"{_UNUSABLE}: it has {keys!r:.200}, but needs {_FORMS}.{hint}")


def _preference_pair(location: str) -> BadRow:
    return BadRow(
        location,
        "preference pair",
        "preference pairs ('chosen', 'rejected') are not trained on; to train on the chosen replies, rename 'chosen' "
        "to 'completion' if the row has a 'prompt', or to 'messages' if it holds the whole chat",
    )
