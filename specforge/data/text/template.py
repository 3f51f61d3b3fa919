"""A verifier's chat template: renders messages to text exactly as in serving."""

from __future__ import annotations

import copy
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date as Date
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from specforge.data.text.turns import Message
from specforge.private.transformers import compiled_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
TIME_LIMIT = 10.0  # seconds for rendering one row
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefusal(Exception):
    """The template cannot render a chat; the message gives the reason."""


class TooSlow(Exception):
    """Rendering exceeded its time limit; unlike after a refusal, no alternative is tried."""


class ChatTemplate:
    """Renders chats with a tokenizer's chat template.

    Args:
        tokenizer: The verifier's tokenizer.
        arguments: Extra arguments of the template, such as ``{"enable_thinking": False}``.
        date: Date that a template prints as today, such as ``2026-11-29``. Default: the day of construction.
        end_tokens: Texts of the tokens that end a reply. Default: the tokenizer's end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
        end_tokens: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.date = date or Date.today().isoformat()
        self._given_date = date
        own = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
        self.end_tokens = tuple(own if end_tokens is None else end_tokens)

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def prints_date(self) -> bool:
        """Whether the rendered text depends on the date."""
        return "strftime_now" in json.dumps(self.tokenizer.chat_template)

    @property
    def identity(self) -> list[Any]:
        """Everything that rendered rows depend on except the chat; the date counts only if it was given."""
        names = [self.tokenizer.chat_template, self.tokenizer.special_tokens_map]
        return [*names, self.end_tokens, self.arguments, self._given_date]

    def with_date(self, date: str) -> ChatTemplate:
        """Return the same template with another date and the same identity."""
        other = copy.copy(self)
        other.date = date
        return other

    def with_arguments(self, **arguments: Any) -> ChatTemplate:
        """Return the same template with additional arguments."""
        other = copy.copy(self)
        other.arguments = {**self.arguments, **arguments}
        return other

    def has_tags(self, tools: list[Any] | None) -> bool:
        """Return whether the template for these tools marks replies with ``{% generation %}``."""
        return bool(_GENERATION_TAG.search(self._source(tools)))

    def render(self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> str:
        """Return the text of a chat.

        Args:
            messages: The chat.
            tools: Tool descriptions, if the chat has any.
            add_generation_prompt: Whether to append the opening of a reply, as in serving.

        Raises:
            TemplateRefusal: The template refuses the chat or fails.
        """
        texts, _ = self._render(messages, tools, add_generation_prompt=add_generation_prompt)
        return str(texts[0])

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the prompt tokens for a reply to a chat.

        Raises:
            TemplateRefusal: See ``render``.
        """
        text = self.render(messages, tools, add_generation_prompt=True)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def tagged_spans(self, messages: Sequence[Message], tools: list[Any] | None) -> list[Span]:
        """Return the half-open character ranges of the rendered chat that ``{% generation %}`` tags mark.

        Raises:
            TemplateRefusal: See ``render``.
        """
        _, spans = self._render(messages, tools, return_assistant_tokens_mask=True)
        return [(int(start), int(end)) for start, end in spans[0]]

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, **options: bool
    ) -> tuple[list[str], list[list[Span]]]:
        source = self._source(tools)
        names = {**self.tokenizer.special_tokens_map, **self.arguments}
        try:
            # One date for all rows of a build; set before each use because the compiled template is shared.
            compiled_template(source).globals["strftime_now"] = datetime.fromisoformat(self.date).strftime
            rendered: tuple[list[str], list[list[Span]]] = render_jinja_template(
                [list(messages)], tools=tools, chat_template=source, **options, **names
            )
        except TooSlow:
            raise
        except RecursionError:
            raise TemplateRefusal("it is nested too deeply") from None
        except Exception as error:  # templates are programs and may raise anything
            raise TemplateRefusal(_described(error)) from error
        return rendered

    def _source(self, tools: list[Any] | None) -> str:
        return self.tokenizer.get_chat_template(tools=tools)


@contextmanager
def time_limit(seconds: float = TIME_LIMIT) -> Iterator[None]:
    """Interrupt the body after some seconds; only in the main thread, the only one that receives signals.

    Raises:
        TooSlow: The time limit is exceeded.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"rendering took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def arguments_advice(arguments: Mapping[str, Any]) -> str:
    """Return which flags to give to render with these template arguments."""
    flags = " ".join(f"--template_arguments.{key} {json.dumps(value)}" for key, value in arguments.items())
    return f"give {flags}" if flags else "omit --template_arguments"


def _described(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:300].strip(": ") or type(error).__name__
