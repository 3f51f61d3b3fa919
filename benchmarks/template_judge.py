"""A slow reference that locates the replies of a conversation, and a judge of rows based on it.

The reference renders each prompt as in serving and each chat up to the end of its reply; the difference is the reply,
up to the verifier's first end token. It shares no code with specforge, renders every prefix separately, and tries every
way to give a row to a template: it aims to be correct, not fast.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Row = dict[str, Any]
Pair = tuple[str, str]  # a reply's context in serving, and the reply

EXACT, REFUSED, NEEDLESS, WRONG = "exact", "refused", "needlessly refused", "silently wrong"
STATUSES = (EXACT, REFUSED, NEEDLESS, WRONG)
_THINK = re.compile(r"</?think>")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SHORTEST = 8  # characters of prompt text that do not occur in a reply by chance


@dataclass(frozen=True)
class Turn:
    """A reply of a conversation.

    Attributes:
        index: Its index among the messages.
        message: The message.
        pairs: Correct pairs of context and reply, one for each faithful way to give the row to the template; empty if
            the reply cannot be located.
        why: The reason if it cannot.
        required: Whether it must be supervised: it answers a user and is not empty.
        ends: Whether an end token is part of it.
    """

    index: int
    message: Message
    pairs: Sequence[Pair]
    why: str
    required: bool
    ends: bool


@dataclass(frozen=True)
class Encoded:
    """A program's encoding of a row.

    Attributes:
        rows: Token rows, each as pieces of text and whether they are supervised.
        refusal: The message, if it refused the row.
    """

    rows: Sequence[Sequence[tuple[str, bool]]] = ()
    refusal: str = ""


@dataclass(frozen=True)
class Verdict:
    """The judgement of a row.

    Attributes:
        status: One of ``STATUSES``.
        kinds: What is wrong.
        detail: Excerpts, or the refusal.
        rows: Number of token rows.
        unlocated: Why replies cannot be located.
    """

    status: str
    kinds: tuple[str, ...] = ()
    detail: str = ""
    rows: int = 0
    unlocated: tuple[str, ...] = ()


class Reference:
    """Locates the replies of conversations as in serving.

    Args:
        tokenizer: Tokenizer with the chat template.
        ends: The verifier's end tokens.
        arguments: Template arguments.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str], arguments: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._end = re.compile("|".join(map(re.escape, ends)))
        self._arguments = dict(arguments or {})

    def turns(self, row: Row) -> list[Turn]:
        """Return each reply of a row."""
        turns = self._turns(row, in_parts=False)
        if not any(turn.pairs for turn in turns):  # some templates render nothing of a string
            in_parts = self._turns(row, in_parts=True)
            turns = in_parts if any(turn.pairs for turn in in_parts) else turns
        return turns

    def _turns(self, row: Row, in_parts: bool) -> list[Turn]:
        forms = list(_forms(row["messages"], in_parts))
        replies = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        return [self._turn(row, forms, index) for index in replies]

    def _turn(self, row: Row, forms: list[list[Message]], index: int) -> Turn:
        message = row["messages"][index]
        pairs: list[Pair] = []
        causes: list[str] = []
        for form in forms:
            located, why = self._locate(form, index, message, row.get("tools"))
            pairs += [pair for pair in located if pair not in pairs]
            causes += [why] if why else []
        answers = any(earlier["role"] == "user" for earlier in row["messages"][:index])
        why = "" if pairs else min(causes, key=lambda cause: cause.startswith("raises"))
        ends = any(self._end.search(reply) for _, reply in pairs)
        return Turn(index, message, pairs, why, answers and bool(own_words(message)), ends)

    def _locate(self, form: list[Message], index: int, message: Message, tools: Any) -> tuple[list[Pair], str]:
        """Return the correct pairs for one way to give the row, or the reason why there are none."""
        try:
            prompt = self._render(form[:index], tools, add_generation_prompt=True)
            through = self._render(form[: index + 1], tools)
        except Exception as error:  # templates may raise any exception
            return [], f"raises: {error}"
        if not through.startswith(prompt):
            return [], _difference(prompt, through)
        reply = through[len(prompt) :]
        if end := self._end.search(reply):
            replies = [reply[: end.end()]]
        else:
            replies = [reply + ending for ending in self._endings(form, index, tools, through)]
        if kind := fault(message, replies[0]):
            return [], kind
        if any(word in reply for word in _prompt_words(form[:index])):
            return [], "the reply holds text of its prompt"
        return [(prompt, candidate) for candidate in replies], ""

    def _endings(self, form: list[Message], index: int, tools: Any, through: str) -> list[str]:
        """Return possible ends of a reply without an end token: the next message's header if it is one, or nothing."""
        try:
            later = self._render(form[: index + 2], tools)
        except Exception:
            return [""]
        if later.startswith(through):
            end = self._end.match(later, len(through))
            return [end.group() if end else ""]
        # The reply is rewritten once it is not the last: it may be supervised with or without the end token.
        tail = (own_words(form[index]) or [""])[-1]
        after = _shared(through, later) - len(tail)
        shown = re.compile(rf"{re.escape(tail)}\s*({self._end.pattern})").search(later, after)
        return ["", shown.group(1)] if tail and shown else [""]

    def _render(self, messages: list[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **self._arguments
        )
        return str(text)


def own_words(message: Message) -> list[str]:
    """Return the stripped texts that a reply must hold: thinking, content and each call."""
    calls = [tool_call["function"] for tool_call in message.get("tool_calls") or ()]
    arguments = [_as_object(call["arguments"]) for call in calls]
    texts = [*_thinking(message), *_content(message), *(call["name"] for call in calls)]
    texts += [text for argument in arguments for text in map(str, _leaves(argument))]
    return [text.strip() for text in texts if text.strip()]


def fault(message: Message, text: str) -> str:
    """Return the parts of a reply that are missing in a text or in a form that no verifier writes."""
    if not all(words.strip() in text for words in _content(message)):
        return "content lost"
    if "{'type': 'text'" in text:
        return "content as Python writes it"
    if not all(words.strip() in text for words in _thinking(message)):
        return "thinking lost"
    calls = [tool_call["function"] for tool_call in message.get("tool_calls") or ()]
    for call in calls:
        if text.count(call["name"]) < sum(other["name"] == call["name"] for other in calls):
            return "call lost"
        arguments = _as_object(call["arguments"])
        if any(f'\\"{key}' in text for key in arguments):
            return "arguments encoded twice"
        if any(f"{{'{key}'" in text for key in arguments):
            return "arguments as Python writes them"
        if not all(any(spelling in text for spelling in _spellings(leaf)) for leaf in _leaves(arguments)):
            return "call lost"
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and scalar values of nested arguments."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _spellings(value: Any) -> list[str]:
    """Return the possible spellings of a value: verbatim, JSON with or without escapes, Python, XML."""
    if not isinstance(value, str):
        return [json.dumps(value), repr(value)]
    escaped = [json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
    return [value, value.strip(), *escaped]


def judge(row: Row, turns: Sequence[Turn], encoded: Encoded) -> Verdict:
    """Judge a program's encoding of a row by the reference's turns."""
    unlocated = tuple(turn.why for turn in turns if turn.required and not turn.pairs)
    located = [turn.index for turn in turns if turn.required and turn.pairs]
    if encoded.refusal:
        return Verdict(REFUSED if unlocated or not located else NEEDLESS, detail=encoded.refusal, unlocated=unlocated)
    kinds: list[str] = []
    details: list[str] = []
    found: list[int] = []
    for pieces in encoded.rows:
        for context, text in _runs(pieces):
            matched, rest = _match(turns, context, text)
            found += matched
            if rest:
                kind, turn = _diagnose(row, turns, pieces, context, text)
                found += [] if turn is None else [turn.index]
                kinds.append(kind)
                details.append(f"{context[-30:]!r} + {text!r}")
    for index in located:
        if index not in found:
            kinds.append("reply not supervised")
            details.append(f"message {index}")
    if not kinds and len(found) > len(set(found)):
        kinds.append("reply supervised twice")
    status = WRONG if kinds else EXACT if found else REFUSED
    return Verdict(status, tuple(dict.fromkeys(kinds)), "; ".join(details), len(encoded.rows), unlocated)


def _runs(pieces: Sequence[tuple[str, bool]]) -> Iterator[Pair]:
    """Yield each supervised run with its context."""
    context = ""
    for text, supervised in pieces:
        if supervised:
            yield context, text
        context += text


def _match(turns: Sequence[Turn], context: str, text: str) -> tuple[list[int], str]:
    """Return the consecutive turns that make up a run, and the remaining text."""
    found = []
    while text:
        hits = [
            (len(reply), turn.index)
            for turn in turns
            for before, reply in turn.pairs
            if reply and before == context and text.startswith(reply)
        ]
        if not hits:
            break
        length, index = max(hits)
        found.append(index)
        context, text = context + text[:length], text[length:]
    return found, text


def _diagnose(
    row: Row, turns: Sequence[Turn], pieces: Sequence[tuple[str, bool]], context: str, text: str
) -> tuple[str, Turn | None]:
    """Return the fault of a supervised run and the turn that it probably belongs to."""
    rendered = "".join(piece for piece, _ in pieces)
    start, stop = len(context), len(context) + len(text)
    for turn in turns:
        for before, reply in turn.pairs:
            first, last = len(before), len(before) + len(reply)
            if not rendered.startswith(before) or stop <= first or start >= last:
                continue
            if start < first:
                return "prompt or header supervised", turn
            if kind := fault(turn.message, rendered[first:stop]):
                return kind, turn
            if start > first:
                return "beginning of the reply not supervised", turn
            if stop > last:
                return "text after the end token supervised", turn
            return (
                "end token not supervised" if (before + reply).startswith(rendered[:stop]) else "reply differs"
            ), turn
    if any(word in text for word in _prompt_words(row["messages"])):
        return "prompt or header supervised", None
    for turn in turns:
        if (words := own_words(turn.message)) and any(word in text for word in words):
            return fault(turn.message, text) or (
                "context is not serving's" if turn.pairs else "cannot be located"
            ), turn
    return "no reply's text supervised", next((turn for turn in turns if not turn.pairs), None)


def _prompt_words(messages: Sequence[Message]) -> list[str]:
    """Return the texts of a chat that none of its replies holds."""
    texts = [text.strip() for message in messages if message["role"] != "assistant" for text in _content(message)]
    return [text for text in texts if len(text) >= _SHORTEST]


def _content(message: Message) -> list[str]:
    content = message.get("content") or ""
    return [part["text"] for part in content] if isinstance(content, list) else _THINK.split(content)


def _thinking(message: Message) -> list[str]:
    return [message[key] for key in _REASONING if message.get(key)]


def _forms(messages: Sequence[Message], in_parts: bool) -> Iterator[list[Message]]:
    """Yield the ways to give messages to a template: arguments as object or string, null content as none or empty."""
    content = _in_parts if in_parts else _joined
    seen: list[list[Message]] = []
    for arguments, nothing in itertools.product((_as_object, _as_string, _as_given), (_without, _empty)):
        form = [content(nothing(_with_arguments(message, arguments))) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _as_string(arguments: Any) -> Any:
    return json.dumps(_as_object(arguments), ensure_ascii=False)


def _as_given(arguments: Any) -> Any:
    return arguments


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    if not message.get("tool_calls"):
        return message
    functions = [tool_call["function"] for tool_call in message["tool_calls"]]
    changed = [function | {"arguments": change(function["arguments"])} for function in functions]
    calls = [old | {"function": new} for old, new in zip(message["tool_calls"], changed, strict=True)]
    return message | {"tool_calls": calls}


def _without(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


def _empty(message: Message) -> Message:
    return {key: "" if key == "content" and value is None else value for key, value in message.items()}


def _joined(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": "".join(part["text"] for part in content)} if isinstance(content, list) else message


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return (
        message | {"content": [{"type": "text", "text": content}]} if content and isinstance(content, str) else message
    )


def _difference(prompt: str, through: str) -> str:
    shared = _shared(prompt, through)
    opened = prompt.rfind("<", 0, shared)
    if opened >= 0 and ">" not in prompt[opened:shared]:  # not from the middle of a token
        shared = opened
    return f"prompt {prompt[shared:][:30]!r}, chat {through[shared:][:30]!r}"


def _shared(left: str, right: str) -> int:
    """Return the length of the common prefix of two texts."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
