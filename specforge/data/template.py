"""From messages to one text with the stretches in it that the verifier would have to produce."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from specforge.data.chat import Message
from specforge.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EXCERPT = 40


@dataclass(frozen=True, slots=True)
class SupervisedText:
    """A text and its supervised stretches.

    Attributes:
        text: what is tokenised, in one piece.
        spans: half-open character ranges, ascending and disjoint, whose tokens are supervised.
        add_special_tokens: whether the tokenizer adds its own (a chat template writes them itself).
    """

    text: str
    spans: Sequence[Span]
    add_special_tokens: bool


class ChatRenderer:
    """Renders chats with a tokenizer's chat template and finds the responses in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._closing_tokens = tuple({*tokenizer.all_special_tokens, *added})

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template at all."""
        return bool(self._tokenizer.chat_template)

    def render(self, messages: list[Message], tools: list[Any] | None, location: str) -> SupervisedText:
        """Render a chat; its spans come from the `{% generation %}` tags, or else from the render boundaries.

        Args:
            messages: the whole chat.
            tools: descriptions of tools for the template, if the row has any.
            location: place to name in errors.

        Raises:
            UsageError: there is no template, it refuses the chat, or its prefixes do not hold.
        """
        if not self.has_template:
            raise UsageError(
                f"{location}: the verifier's tokenizer has no chat template; give rows with 'text', with 'prompt' and "
                "'response', or with 'input_ids' and 'loss_mask'"
            )
        render = _BoundTemplate(self._tokenizer, tools, location)
        if _GENERATION_TAG.search(render.template):
            text, spans = render.with_generation_spans(messages)
        else:
            text, spans = self._boundary_spans(messages, render, location)
        return SupervisedText(text, spans, add_special_tokens=False)

    def _boundary_spans(self, messages: list[Message], render: _BoundTemplate, location: str) -> tuple[str, list[Span]]:
        text = render(messages)
        spans = []
        # A greeting before any user message answers nothing, and templates cannot render an empty chat before it.
        for number in range(1, len(messages)):
            if messages[number]["role"] != "assistant":
                continue
            prefix = render(messages[:number], add_generation_prompt=True)
            through = render(messages[: number + 1])
            _require_prefix(prefix, through, f"{location}: message {number}")
            end = self._response_end(through, len(prefix))
            _require_prefix(through[:end], text, f"{location}: message {number}")
            spans.append((len(prefix), end))
        return text, spans

    def _response_end(self, text: str, start: int) -> int:
        """Return where the response ends: after its closing token, before the blanks that the template adds."""
        stripped = text[start:].rstrip()
        return start + len(stripped) if stripped.endswith(self._closing_tokens) else len(text)


class _BoundTemplate:
    """The template that fits the tools of a row; call it to render messages to text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, location: str) -> None:
        self._tools = tools
        self._location = location
        self._special_tokens = tokenizer.special_tokens_map
        self.template: str = tokenizer.get_chat_template(tools=tools)

    def __call__(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        texts, _ = self._render(messages, add_generation_prompt=add_generation_prompt)
        return str(texts[0])

    def with_generation_spans(self, messages: list[Message]) -> tuple[str, list[Span]]:
        texts, spans = self._render(messages, return_assistant_tokens_mask=True)
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def _render(self, messages: list[Message], **options: bool) -> tuple[list[str], list[list[Span]]]:
        try:
            rendered: tuple[list[str], list[list[Span]]] = render_jinja_template(
                [messages], tools=self._tools, chat_template=self.template, **options, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"{self._location}: the chat template refuses this chat: {error}") from error
        return rendered


def _require_prefix(prefix: str, text: str, location: str) -> None:
    if text.startswith(prefix):
        return
    pairs = enumerate(zip(prefix, text, strict=False))
    parting = next((place for place, (left, right) in pairs if left != right), min(len(prefix), len(text)))
    shared, expected, found = prefix[:parting][-_EXCERPT:], prefix[parting:][:_EXCERPT], text[parting:][:_EXCERPT]
    raise UsageError(
        f"{location}: the chat template's prefixes do not hold, so the response cannot be told from the render "
        f"boundaries: after {shared!r} the shorter render goes on {expected!r}, the longer one {found!r}. "
        "Use a template with {% generation %} tags, or rows with 'input_ids' and 'loss_mask'"
    )
