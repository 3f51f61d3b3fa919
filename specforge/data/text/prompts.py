"""Prompt sets: conversations whose replies the verifier will generate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.chat import CHAT_KEYS, Chat, Message, read_chat
from specforge.data.text.encoding import is_foreign
from specforge.data.text.records import Record
from specforge.data.text.sources import check_source, read_records
from specforge.data.text.template import ChatTemplate, TemplateRefusal, TooSlow, time_limit
from specforge.data.text.tool_calls import read_tools
from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conversation:
    """The user's side of a conversation, turn by turn.

    Attributes:
        turns: The input before each reply: messages of a chat, or token ids for a tokenised prompt.
        location: File and line to name in errors, such as ``prompts.jsonl:12``.
        tools: Tool descriptions for the chat template; None if there are none.
        category: Kind of the conversation; None if the row does not state it.
        messages: The messages of a tokenised prompt, in case that its ids are of another tokenizer; None if the row
            has none.
    """

    turns: tuple[list[Message] | list[int], ...]
    location: str
    tools: list[dict[str, Any]] | None = None
    category: str | None = None
    messages: list[Message] | None = None

    def prompt(self, turn: int, replies: list[str], template: ChatTemplate) -> list[int]:
        """Return the prompt tokens of a reply.

        Args:
            turn: Index of the reply, from 0.
            replies: The earlier replies, one for each turn before this one.
            template: The verifier's chat template.

        Raises:
            UsageError: There is no chat template, or it refuses the chat.
        """
        current = self.turns[turn]
        if current and isinstance(current[0], int):
            tokens = [token for token in current if isinstance(token, int)]
            if self.messages is None or not _are_foreign(tokens, self.messages, template):
                return tokens
            return replace(self, turns=(self.messages,), messages=None).prompt(0, [], template)
        if not template.exists:
            raise UsageError(
                f"{self.location}: the verifier's tokenizer has no chat template; give rows with 'input_ids'"
            )
        try:
            with time_limit():
                return template.prompt(self.chat(turn, replies), self.tools)
        except (TemplateRefusal, TooSlow) as error:
            raise UsageError(f"{self.location}: the chat cannot be rendered: {error}") from error

    def chat(self, turn: int, replies: list[str]) -> list[Any]:
        """Return the messages before a reply, including earlier replies; not for tokenised prompts."""
        chat: list[Any] = []
        for number, messages in enumerate(self.turns[: turn + 1]):
            chat += [{"role": "assistant", "content": replies[number - 1]}] if number else []
            chat += messages
        return chat


def read_prompts(source: str, key: str = "--prompts", limit: int | None = None) -> list[Conversation]:
    """Read a prompt set.

    A row holds ``turns`` (a list of texts, one per user turn), ``input_ids`` and ``loss_mask`` (the prompt ends before
    the first supervised token; if the row also has messages whose text they do not hold, they are of another tokenizer,
    and the messages count), ``messages`` or ``conversations`` (their replies are left out), or ``prompt``; and
    ``category``, if it is to be measured by category.

    Args:
        source: Path or hub name, see ``specforge.data.text.sources``.
        key: Name of the option, for errors.
        limit: Maximum number of conversations of each category; None for all.

    Raises:
        UsageError: The source or a row is malformed, or there are no rows.
    """
    check_source(source, key)
    conversations: list[Conversation] = []
    numbers: Counter[str | None] = Counter()
    for record in read_records(source):
        if limit is not None and numbers == {None: limit}:
            break  # no row has a category, so the rest of a long file is not read
        conversation = read_conversation(record)
        numbers[conversation.category] += 1
        if limit is None or numbers[conversation.category] <= limit:
            conversations.append(conversation)
    if not conversations:
        raise UsageError(f"{key}: {source} holds no prompts")
    return conversations


def read_conversation(record: Record) -> Conversation:
    """Return the prompts of one row, see ``read_prompts``.

    Raises:
        BadRow: The row is malformed.
    """
    turns = _turns(record)
    is_tokenised = isinstance(turns[0][0], int)
    has_messages = isinstance(record.value.get("messages"), list)
    tools = None
    if has_messages or not is_tokenised:
        tools = read_tools(record.value.get("tools"), record.location)
    messages = _split_at_replies(record)[0] if is_tokenised and has_messages else None
    category = record.value.get("category")
    is_named = isinstance(category, str) and category.strip()
    return Conversation(tuple(turns), record.location, tools, str(category).strip() if is_named else None, messages)


def by_category(name: str, conversations: Sequence[Conversation]) -> dict[str, list[Conversation]]:
    """Split a prompt set by category; without categories it is a single set.

    Args:
        name: Name of the prompt set.
        conversations: Its conversations.

    Returns:
        By name, such as ``"speed-bench coding"``, in the order of the first rows.
    """
    found: dict[str, list[Conversation]] = {}
    for one in conversations:
        found.setdefault(name if one.category is None else f"{name} {one.category}", []).append(one)
    return found


def reply_text(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a reply for later turns: the text after its last control token, which ends its thinking.

    Args:
        tokens: The reply, including its end token.
        tokenizer: The verifier's tokenizer.
    """
    special = set(tokenizer.all_special_ids)
    body = list(tokens[:-1]) if tokens and tokens[-1] in special else list(tokens)
    last = max((position for position, token in enumerate(body) if token in special), default=-1)
    text = str(tokenizer.decode(body[last + 1 :], skip_special_tokens=True))
    return text if text.strip() else str(tokenizer.decode(body, skip_special_tokens=True))


def prompt_set_name(source: str) -> str:
    """Return the name of a prompt set: the file name without its suffixes, or the source itself."""
    path = Path(source.removesuffix(".gz"))
    return path.stem if path.suffix else source


def _are_foreign(tokens: list[int], messages: list[Message], template: ChatTemplate) -> bool:
    """Return whether token ids do not hold the text of the last message."""
    content = messages[-1].get("content")
    return isinstance(content, str) and is_foreign(tokens, content, template.tokenizer)


def _turns(record: Record) -> list[list[Message] | list[int]]:
    value = record.value
    if (turns := value.get("turns")) is not None:
        if not isinstance(turns, list) or not turns or not all(isinstance(one, str) and one.strip() for one in turns):
            raise BadRow(record.location, "malformed turns", "'turns' must be a list of non-empty texts")
        return [[{"role": "user", "content": one}] for one in turns]
    if value.get("input_ids") is not None and value.get("loss_mask") is not None:
        tokens, mask = value["input_ids"], value["loss_mask"]
        if not isinstance(tokens, list) or not isinstance(mask, list) or not all(type(one) is int for one in tokens):
            raise BadRow(record.location, "malformed tokens", "'input_ids' and 'loss_mask' must be lists of integers")
        begin = mask.index(1) if 1 in mask else len(mask)
        if not tokens[:begin]:
            raise BadRow(record.location, "no prompt", "'input_ids' holds no prompt before the first supervised token")
        return [tokens[:begin]]
    if isinstance(value.get("prompt"), str) and value["prompt"].strip():
        system = value.get("system")
        first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
        return [[*first, {"role": "user", "content": value["prompt"]}]]
    if isinstance(value.get("prompt"), list) or any(value.get(key) is not None for key in (*CHAT_KEYS, "instruction")):
        return [*_split_at_replies(record)]
    raise BadRow(
        record.location,
        "unknown form",
        f"a row without a prompt: it has {sorted(value)!r:.200}, but needs 'turns', 'messages', 'conversations', "
        "'prompt', 'instruction', or 'input_ids' and 'loss_mask'",
    )


def _split_at_replies(record: Record) -> list[list[Message]]:
    """Split a chat at its replies, which are left out; messages after the last one need a user or tool message."""
    chat = read_chat(record, needs_reply=False)
    assert isinstance(chat, Chat)  # not a text row
    turns: list[list[Message]] = []
    pending: list[Message] = []
    for message in chat.messages:
        if message["role"] != "assistant":
            pending.append(message)
        elif any(one["role"] in ("user", "tool") for one in pending):
            turns.append(pending)
            pending = []
    if any(one["role"] in ("user", "tool") for one in pending):
        turns.append(pending)
    if not turns:
        raise BadRow(record.location, "no prompt", "the chat has no user or tool message to answer")
    return turns
