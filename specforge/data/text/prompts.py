"""Prompts to answer: conversations whose replies are left to the verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.chat import CHAT_KEYS, Chat, Message, read_chat
from specforge.data.text.records import Record
from specforge.data.text.sources import check_source, read_records
from specforge.data.text.template import ChatTemplate, TemplateRefusal, TooSlow, time_limit
from specforge.data.text.tool_calls import read_tools
from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conversation:
    """What a person says, turn by turn.

    Attributes:
        turns: What comes before each reply: messages of a chat, or one list of tokens for a prompt that is tokenised.
        location: File and line to name in errors, such as ``prompts.jsonl:12``.
        tools: Descriptions of tools for the chat template; None if there are none.
    """

    turns: tuple[list[Message] | list[int], ...]
    location: str
    tools: list[dict[str, Any]] | None = None

    def prompt(self, turn: int, replies: list[str], template: ChatTemplate) -> list[int]:
        """Return the tokens that a reply follows.

        Args:
            turn: Which reply, from 0.
            replies: The replies so far, one before each later turn.
            template: The verifier's.

        Raises:
            UsageError: The tokenizer has no chat template, or it refuses the chat.
        """
        said = self.turns[turn]
        if said and isinstance(said[0], int):
            return [token for token in said if isinstance(token, int)]
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
        """Return the messages that a reply follows, the replies so far among them; not where a prompt is tokens."""
        chat: list[Any] = []
        for number, messages in enumerate(self.turns[: turn + 1]):
            chat += [{"role": "assistant", "content": replies[number - 1]}] if number else []
            chat += messages
        return chat


def read_prompts(source: str, key: str = "--prompts", limit: int | None = None) -> list[Conversation]:
    """Read a prompt set.

    A row holds ``turns`` (a list of texts, one a turn of the user), ``input_ids`` and ``loss_mask`` (the prompt is what
    comes before the first supervised token), ``messages`` or ``conversations`` (replies in it are left out), or
    ``prompt``.

    Args:
        source: Path or hub name, see ``specforge.data.text.sources``.
        key: What to call the source in errors.
        limit: Read only so many; None for all.

    Raises:
        UsageError: The source or a row is wrong, or there is none.
    """
    check_source(source, key)
    conversations: list[Conversation] = []
    for record in read_records(source):
        if limit is not None and len(conversations) == limit:
            break
        conversations.append(read_conversation(record))
    if not conversations:
        raise UsageError(f"{key}: {source} holds no prompts")
    return conversations


def read_conversation(record: Record) -> Conversation:
    """Return the prompts of one row, see ``read_prompts``.

    Raises:
        BadRow: The row is wrong.
    """
    turns = _turns(record)
    tools = None if isinstance(turns[0][0], int) else read_tools(record.value.get("tools"), record.location)
    return Conversation(tuple(turns), record.location, tools)


def reply_text(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a reply as a later turn reads it: its text after its last control token, where channels of thinking end.

    Args:
        tokens: The reply, with its end token.
        tokenizer: The verifier's.
    """
    special = set(tokenizer.all_special_ids)
    body = list(tokens[:-1]) if tokens and tokens[-1] in special else list(tokens)
    last = max((position for position, token in enumerate(body) if token in special), default=-1)
    text = str(tokenizer.decode(body[last + 1 :], skip_special_tokens=True))
    return text if text.strip() else str(tokenizer.decode(body, skip_special_tokens=True))


def prompt_set_name(source: str) -> str:
    """Return what to call a prompt set: the file's name without its endings, or the source as it is."""
    path = Path(source.removesuffix(".gz"))
    return path.stem if path.suffix else source


def _turns(record: Record) -> list[list[Message] | list[int]]:
    value = record.value
    if (turns := value.get("turns")) is not None:
        if not isinstance(turns, list) or not turns or not all(isinstance(one, str) and one.strip() for one in turns):
            raise BadRow(record.location, "malformed turns", "'turns' must be a list of texts that are not empty")
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
        return _asked(record)
    raise BadRow(
        record.location,
        "unknown form",
        f"a row without a prompt: it has {sorted(value)!r:.200}, and needs 'turns', 'messages', 'conversations', "
        "'prompt', 'instruction', or 'input_ids' and 'loss_mask'",
    )


def _asked(record: Record) -> list[list[Message] | list[int]]:
    """Split a chat at its replies, which are left out; what follows the last one counts only if somebody asks."""
    chat = read_chat(record, needs_reply=False)
    assert isinstance(chat, Chat)  # the row is none of text
    turns: list[list[Message] | list[int]] = []
    said: list[Message] = []
    for message in chat.messages:
        if message["role"] != "assistant":
            said.append(message)
        elif any(one["role"] in ("user", "tool") for one in said):
            turns.append(said)
            said = []
    if any(one["role"] in ("user", "tool") for one in said):
        turns.append(said)
    if not turns:
        raise BadRow(record.location, "no prompt", "a chat in which nobody asks anything")
    return turns
