"""Locating the replies of a chat in its rendered text: exactly what the verifier would generate in serving.

For the reply m_i of a chat m_0 .. m_n, let P_i = render(m_0 .. m_{i-1}) with the generation prompt, and
T_i = render(m_0 .. m_i). P_i must be a prefix of T_i. The reply is T_i[len(P_i) : e], where e is the end of the first
end token of the verifier after P_i. It must contain the reply's own text: content, thinking and tool calls.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.chat import Chat
from specforge.data.text.template import ChatTemplate, Span, TemplateRefusal, TooSlow, time_limit
from specforge.data.text.turns import Message

BETWEEN = "between prompt and end token"
NEXT_HEADER = "up to the next role's header, which ends it"
UNENDED = "no end token"
TAGGED = "generation tags agree"
CORRECTED = "generation tags corrected"
_BLOCK = 8  # replies of a long chat rendered together
_EXCERPT = 40
_THINKING = re.compile(r"</?think>")


@dataclass(frozen=True, slots=True)
class SupervisedText:
    """A text and its supervised spans.

    Attributes:
        text: The text to tokenise in one piece.
        spans: Half-open character ranges whose tokens are supervised, ascending and disjoint.
        rules: How each span was found.
        add_special_tokens: Whether the tokenizer adds special tokens; a chat template writes them itself.
    """

    text: str
    spans: tuple[Span, ...]
    rules: tuple[str, ...]
    add_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Replies:
    """The replies of one chat.

    Attributes:
        texts: One text per row: a single one unless the template rewrites earlier turns.
        is_whole: Whether the whole chat was rendered, not only the requested part.
    """

    texts: list[SupervisedText]
    is_whole: bool


@dataclass(frozen=True, slots=True)
class _ReplySpan:
    """One reply.

    Attributes:
        index: Index of its message.
        start: Start of the reply in the text.
        end: End of the reply in the text.
        text: The rendered chat up to the end of the reply; the end token may come from the next message's header.
        rendered: Characters of the chat rendered up to this message.
        common: Leading characters that ``text`` shares with that rendering.
        rule: How the reply was found.
    """

    index: int
    start: int
    end: int
    text: str
    rendered: int
    common: int
    rule: str


class ReplyFinder:
    """Renders chats and locates their replies.

    Args:
        template: The verifier's chat template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        added = {token.content: token for token in template.tokenizer.added_tokens_decoder.values()}
        special = {*template.tokenizer.all_special_tokens, *(text for text, token in added.items() if token.special)}
        # A token that strips spaces to its right covers them; it counts if all of it is inside the span.
        stripping = {text for text, token in added.items() if token.rstrip}
        self._end_tokens = _any_of(template.end_tokens, stripping)
        self._special_tokens = _any_of(special, stripping)
        self._remedies: dict[str, str] = {}  # by reason; searched for once, not for each row

    def find(self, chat: Chat, location: str, characters: int | None = None) -> Replies:
        """Render a chat and locate the replies to train on.

        Args:
            chat: The chat.
            location: Location of its row, for errors.
            characters: Render at least this many characters of content; None for all.

        Raises:
            BadRow: The template refuses the chat, a reply's text is not in its span, or the span cannot be located.
        """
        if not self.template.exists:
            raise BadRow(
                location,
                "no chat template",
                "the verifier's tokenizer has no chat template; give rows with 'text', with 'prompt' and 'response', "
                "or with 'input_ids' and 'loss_mask'",
            )
        cut = _truncated(chat, characters)
        try:
            with time_limit():
                texts = _Rendering(self, cut).texts()
        except TooSlow as error:
            raise BadRow(location, "too slow to render", str(error)) from error
        except TemplateRefusal as error:
            raise BadRow(location, *self._explained(error, cut)) from error
        return Replies(texts, is_whole=len(cut.messages) == len(chat.messages))

    def end_after(self, text: str, start: int) -> int | None:
        """Return the end of the verifier's first end token after a position; None if there is none."""
        match = self._end_tokens.search(text, start) if self._end_tokens else None
        return match and match.end()

    def leading_end(self, text: str) -> str:
        """Return the end token at the start of a text with the spaces before it; empty if there is none."""
        match = self._end_tokens.match(text, len(text) - len(text.lstrip())) if self._end_tokens else None
        return text[: match.end()] if match else ""

    def special_after(self, text: str, start: int) -> int | None:
        """Return the end of the first special token after a position; None if there is none."""
        match = self._special_tokens.search(text, start) if self._special_tokens else None
        return match and match.end()

    def _explained(self, error: TemplateRefusal, chat: Chat) -> tuple[str, str]:
        """Return the reason by which a refusal is counted, and its explanation."""
        if not isinstance(error, _ReplyNotLocated):
            return f"chat template: {error}"[:80], f"the chat template refuses this chat: {error}"
        if error.reason not in self._remedies:
            arguments = next((one for one in _REMEDIES if self._works(chat, one)), None)
            self._remedies[error.reason] = "" if arguments is None else f"--template_arguments.{arguments}, "
        return error.reason, (
            f"{error}. Alternatives: {self._remedies[error.reason]}specforge prepare responses, or rows with "
            "'input_ids' and 'loss_mask'"
        )

    def _works(self, chat: Chat, argument: str) -> bool:
        name, value = argument.split()
        if name not in str(self.template.tokenizer.chat_template):
            return False
        template = self.template.with_arguments(**{name: value == "true"})
        try:
            with time_limit():
                _Rendering(ReplyFinder(template), chat).texts()
        except (TemplateRefusal, TooSlow):
            return False
        return True


_REMEDIES = (
    "enable_thinking false",
    "enable_thinking true",
    "thinking false",
    "thinking true",
)  # arguments in common use


class _ReplyNotLocated(TemplateRefusal):
    """The chat was rendered, but a reply cannot be located in the text."""

    def __init__(self, reason: str, explanation: str) -> None:
        super().__init__(explanation)
        self.reason = reason


@dataclass(frozen=True)
class _Rendering:
    """The rendering of one chat."""

    finder: ReplyFinder
    chat: Chat

    def texts(self) -> list[SupervisedText]:
        """Return the rows of the chat; if rendering fails, retry with call arguments as JSON strings."""
        try:
            return self._texts()
        except TemplateRefusal:
            encoded = [_with_encoded_arguments(message) for message in self.chat.messages]
            if encoded == self.chat.messages:
                raise
            try:
                return replace(self, chat=replace(self.chat, messages=encoded))._texts()
            except TemplateRefusal:
                pass
            raise

    def _texts(self) -> list[SupervisedText]:
        replies = [number for number, is_reply in enumerate(self.chat.supervised) if is_reply]
        if len(replies) > 2 * _BLOCK and (joined := self._from_blocks(replies)):
            return [joined]
        groups: list[list[_ReplySpan]] = []
        for number in replies:
            reply = self._find(self.chat.messages, number)
            last = groups[-1][-1] if groups else None
            if last and reply.text[: reply.start].startswith(last.text[: last.end]):
                groups[-1].append(reply)
            else:
                groups.append([reply])
        return [self._row(group) for group in groups]

    def _row(self, group: list[_ReplySpan]) -> SupervisedText:
        """Return the row of some replies: the text up to the end of the last one."""
        last = group[-1]
        spans = tuple((reply.start, reply.end) for reply in group)
        rules = [reply.rule for reply in group]
        if self.finder.template.has_tags(self.chat.tools):
            tags = self.finder.template.tagged_spans(self.chat.messages[: last.index + 1], self.chat.tools)
            rules = [self._compare_tags(reply, tags, last.text) for reply in group]
        return SupervisedText(last.text, spans, tuple(rules))

    def _compare_tags(self, reply: _ReplySpan, tags: list[Span], text: str) -> str:
        """Compare the template's own tags with a span that was found by the rule."""
        if (reply.start, reply.end) in tags:
            return TAGGED
        inside = "".join(text[max(a, reply.start) : min(b, reply.end)] for a, b in tags)
        if missing := _missing(self.chat.messages[reply.index], inside):
            raise _ReplyNotLocated(
                "generation tags omit text",
                f"message {reply.index}: the {{% generation %}} tags of the chat template omit its {missing}",
            )
        return CORRECTED

    def _find(self, messages: Sequence[Message], index: int) -> _ReplySpan:
        """Locate one reply by the rule in the module docstring."""
        template, tools = self.finder.template, self.chat.tools
        prompt = template.render(messages[:index], tools, add_generation_prompt=True)
        text = template.render(messages[: index + 1], tools)
        if not text.startswith(prompt):
            raise _ReplyNotLocated("the prompt is not a prefix", _describe_difference(prompt, text, index))
        start, rendered = len(prompt), len(text)
        common, end, rule = rendered, self.finder.end_after(text, start), BETWEEN
        if end is None:
            common, shown = self._shown_end(messages, index, text, start)
            text = text[:common] + shown
            end, rule = len(text), NEXT_HEADER
            if not shown:
                end, rule = self._end_without_token(messages[index], text, start), UNENDED
        if missing := _missing(messages[index], text[start:end]):
            raise _ReplyNotLocated(
                f"its {missing.partition(' ')[0]} is lost",
                f"message {index}: its {missing} is not in the text that the chat template renders for the reply, "
                f"{text[start:end][:_EXCERPT]!r}",
            )
        return _ReplySpan(index, start, end, text, rendered, common, rule)

    def _shown_end(self, messages: Sequence[Message], index: int, text: str, start: int) -> tuple[int, str]:
        """Return the length of text before an end token that only the next message shows, and that end token.

        The end token comes from the header of the next message; it is an empty string if there is none.
        """
        following = ""
        if index + 1 < len(messages):
            try:
                following = self.finder.template.render(messages[: index + 2], self.chat.tools)
            except TemplateRefusal:
                return len(text), ""
        if following.startswith(text):
            return len(text), self.finder.leading_end(following[len(text) :])
        # The template rewrites the reply once it is not the last message: look only for its end.
        tail = messages[index]["content"].strip()[-_EXCERPT:]
        here = text.rfind(tail, start)
        if not tail or not following or here < 0:
            return len(text), ""
        before_next = following[: following.rfind(messages[index + 1]["content"].strip())]
        ends = (match.end() for match in re.finditer(re.escape(tail), before_next) if match.start() >= min(here, start))
        shown = next(filter(None, (self.finder.leading_end(before_next[end:]) for end in ends)), "")
        return (here + len(tail) if shown else len(text)), shown

    def _end_without_token(self, message: Message, text: str, start: int) -> int:
        """Return the end of a reply without end token: after the first special token that follows its text."""
        tail = message["content"].strip()
        position = text.rfind(tail, start) if tail else -1
        end = self.finder.special_after(text, position + len(tail)) if position >= 0 else None
        return len(text) if end is None else end

    def _from_blocks(self, replies: list[int]) -> SupervisedText | None:
        """Locate the replies of a long chat in linear time; None if this does not work with the template.

        Each block of turns is rendered as a separate chat with the system message. Neighbouring blocks overlap by the
        messages between their replies; joined, they must equal the text of the whole chat.
        """
        messages = self.chat.messages
        lead = next(n for n, message in enumerate(messages) if message["role"] not in ("system", "developer"))
        blocks = _blocks(replies, messages)
        spans: list[Span] = []
        rules: list[str] = []
        try:
            whole = self.finder.template.render(messages[: replies[-1] + 1], self.chat.tools)
            begin, shift, length = lead, 0, 0
            for number, block in enumerate(blocks):
                is_last = number == len(blocks) - 1
                after = min(block[-1] + 2, len(messages)) if is_last else blocks[number + 1][0]
                local = [*messages[:lead], *messages[begin:after]]
                found = [self._find(local, index - begin + lead) for index in block]
                shift += length - found[0].start if number else 0
                if is_last:
                    text, last = found[-1].text, found[-1]
                    whole = whole[: len(whole) - last.rendered + last.common] + text[last.common :]
                else:
                    text = self.finder.template.render(local, self.chat.tools, add_generation_prompt=True)
                first, length = found[0].start if number else 0, len(text)
                if whole[shift + first : shift + length] != text[first:]:
                    return None
                if not all(text.startswith(reply.text[: reply.end]) for reply in found):
                    return None
                spans += [(reply.start + shift, reply.end + shift) for reply in found]
                rules += [reply.rule for reply in found]
                begin = block[-1] + 1
        except TemplateRefusal:
            return None
        if shift + length != len(whole):
            return None
        joined = [
            _ReplySpan(index, start, end, whole, len(whole), len(whole), rule)
            for index, (start, end), rule in zip(replies, spans, rules, strict=True)
        ]
        return self._row(joined)


def _any_of(tokens: Sequence[str] | set[str], stripping: set[str]) -> re.Pattern[str] | None:
    ordered = sorted(filter(None, tokens), key=len, reverse=True)
    alternatives = [re.escape(token) + (r"\s*" if token in stripping else "") for token in ordered]
    return re.compile("|".join(alternatives)) if alternatives else None


def _blocks(replies: list[int], messages: Sequence[Message]) -> list[list[int]]:
    """Split replies into blocks; like a chat, each block begins with a user message."""
    blocks: list[list[int]] = [[]]
    for index in replies:
        if len(blocks[-1]) >= _BLOCK and messages[blocks[-1][-1] + 1]["role"] == "user":
            blocks.append([])
        blocks[-1].append(index)
    return blocks


def _truncated(chat: Chat, characters: int | None) -> Chat:
    """Return a chat up to the first supervised reply that ends after this many characters."""
    if characters is None:
        return chat
    total = 0
    for number, message in enumerate(chat.messages):
        total += len(message["content"])
        if total > characters and chat.supervised[number]:
            kept = number + 1
            return replace(chat, messages=chat.messages[:kept], supervised=chat.supervised[:kept])
    return chat


def _missing(message: Message, reply: str) -> str | None:
    """Return which part of a message is missing in its reply, ignoring spaces; None if nothing is."""
    found = _without_spaces(reply)
    content = message["content"]
    pieces = [content] if _without_spaces(content) in found else _THINKING.split(content)
    position = 0
    # In order: a short thought may also occur in the answer.
    for piece in (message.get("reasoning_content", ""), *pieces):
        start = found.find(_without_spaces(piece), position)
        if start < 0:
            return "content" if _without_spaces(pieces[-1]) not in found else "thinking"
        position = start + len(_without_spaces(piece))
    functions = [call["function"] for call in message.get("tool_calls", ())]
    names = Counter(function["name"] for function in functions)
    for function in functions:
        if reply.count(function["name"]) < names[function["name"]]:
            return f"call of {function['name']}"
        if not _contains_arguments(function["arguments"], reply, found):
            return f"call of {function['name']} with its arguments"
    return None


def _contains_arguments(arguments: Any, reply: str, found: str) -> bool:
    if isinstance(arguments, str):  # already JSON: if encoded twice, it does not occur verbatim
        return _without_spaces(arguments) in found
    if arguments and repr(arguments) in reply and json.dumps(arguments) not in reply:
        return False  # a Python repr in the text: the template expects JSON strings
    return _contains(arguments, found)


def _contains(value: Any, found: str) -> bool:
    """Return whether a call's value occurs in a text without spaces, in any notation: JSON, XML, Python."""
    match value:
        case dict():
            return all(_contains(key, found) and _contains(one, found) for key, one in value.items())
        case list():
            return all(_contains(one, found) for one in value)
        case str():
            escaped = (json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
            return any(_without_spaces(one) in found for one in (value, *escaped))
        case None | bool():
            return json.dumps(value) in found or repr(value) in found
    return _without_spaces(json.dumps(value)) in found


def _with_encoded_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _shared_length(left: str, right: str) -> int:
    """Return the length of the common prefix of two texts."""
    lengths = range(1, min(len(left), len(right)) + 1)
    return bisect_left(lengths, True, key=lambda length: not left.startswith(right[:length]))


def _describe_difference(prompt: str, text: str, index: int) -> str:
    shared = _shared_length(prompt, text)
    before, expected, found = prompt[:shared][-_EXCERPT:], prompt[shared:][:_EXCERPT], text[shared:][:_EXCERPT]
    return (
        f"message {index}: the reply cannot be located because the chat template renders the chat differently from "
        f"the prompt in serving: after {before!r} the prompt has {expected!r}, the chat {found!r}"
    )
