"""Schema of OpenAI's completions, whole and streamed, with the token ids and references to states that vLLM adds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from specforge.engines.connection import Strict

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class Message(Strict):
    """The verifier's text, and the parts that engines move out of it."""

    content: str | None = None
    tool_calls: list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(Strict):
    """One reply, its finish reason and its tokens."""

    message: Message
    finish_reason: str
    token_ids: TokenIds | None = None


class Usage(Strict):
    """Token counts of the engine."""

    completion_tokens: Annotated[int, Field(ge=0)] | None = None


class Completion(Strict):
    """A response; invalid JSON, such as an unpaired surrogate in a text, is refused."""

    choices: Annotated[list[Choice], Field(min_length=1)]
    prompt_token_ids: TokenIds | None = None
    kv_transfer_params: dict[str, Any] | None = None
    usage: Usage | None = None


class Delta(Strict):
    """What one event adds to a chat's reply."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class StreamedChoice(Strict):
    """What one event adds to a reply: ``delta`` of a chat, ``text`` of a completion."""

    delta: Delta | None = None
    text: str | None = None


class StreamedPart(Strict):
    """One event of a streamed response; the token counts come in the last one."""

    choices: list[StreamedChoice] = Field(default_factory=list)
    usage: Usage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        """The added text, without thinking."""
        return "".join(one.text or (one.delta.content if one.delta else None) or "" for one in self.choices)

    @property
    def has_output(self) -> bool:
        """Whether it adds any generated token, thinking and tool calls included."""
        deltas = [one.delta for one in self.choices if one.delta]
        return bool(self.text) or any(one.reasoning_content or one.reasoning or one.tool_calls for one in deltas)


class Extraction(Strict):
    """A response of an engine that extracts states."""

    choices: Annotated[list[Any], Field(min_length=1)]
    kv_transfer_params: dict[str, Any] | None = None


def read_completion(body: bytes, vocabulary: int | None = None) -> Completion:
    """Parse and check a response.

    Args:
        body: The response body.
        vocabulary: Vocabulary size V of the verifier; None if unknown.

    Raises:
        ValueError: The body has another form, or token ids outside the vocabulary.
    """
    completion = Completion.model_validate_json(body)
    for where, ids in (
        ("choices.0.token_ids", completion.choices[0].token_ids),
        ("prompt_token_ids", completion.prompt_token_ids),
    ):
        if vocabulary is not None and ids is not None and max(ids) >= vocabulary:
            raise ValueError(f"{where} has id {max(ids)}, but the verifier has {vocabulary} tokens")
    return completion
