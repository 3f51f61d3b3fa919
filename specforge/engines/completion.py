"""What an answer of OpenAI's chat completions has to be, token ids included, which vLLM adds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from specforge.engines.connection import Strict

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class Message(Strict):
    """What the verifier wrote, and what engines take out of its text."""

    content: str | None = None
    tool_calls: list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(Strict):
    """One reply, why it ended, and its tokens."""

    message: Message
    finish_reason: str
    token_ids: TokenIds | None = None


class Usage(Strict):
    """What the engine counted."""

    completion_tokens: Annotated[int, Field(ge=0)] | None = None


class Completion(Strict):
    """An answer; half a surrogate is no text, and refused with the rest of what is no JSON."""

    choices: Annotated[list[Choice], Field(min_length=1)]
    prompt_token_ids: TokenIds | None = None
    usage: Usage | None = None


def read_completion(body: bytes, vocabulary: int | None = None) -> Completion:
    """Read an answer.

    Args:
        body: As it came.
        vocabulary: Number of the verifier's tokens; None if it is not known.

    Raises:
        ValueError: It is of another shape, or has tokens that the verifier does not have.
    """
    completion = Completion.model_validate_json(body)
    for where, ids in (
        ("choices.0.token_ids", completion.choices[0].token_ids),
        ("prompt_token_ids", completion.prompt_token_ids),
    ):
        if vocabulary is not None and ids is not None and max(ids) >= vocabulary:
            raise ValueError(f"{where} has {max(ids)}, and the verifier has {vocabulary} tokens")
    return completion
