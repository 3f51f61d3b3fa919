"""Schema of OpenAI's completions, with the token ids and the references to states that vLLM adds."""

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
