"""Acceptance of a running server on given prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import openai
from openai import AsyncOpenAI, OpenAIError
from pydantic import Field

from specforge.engines.connection import Address, Connection, Models, Strict, on_one_line
from specforge.engines.counters import Measured, read_counters
from specforge.errors import SpecforgeError

# Seconds allowed for the response to a prompt.
ANSWER_SECONDS = 600.0
TokenPrompt = tuple[list[int], int]  # a prompt and the number of tokens to generate


class _Completion(Strict):
    """A response to a prompt; its text does not matter."""

    choices: Annotated[list[dict[str, Any]], Field(min_length=1)]


def measure(url: str, prompts: Sequence[TokenPrompt]) -> Measured:
    """Send prompts to a server at temperature 0 and read its counters.

    Args:
        url: URL of the server, such as ``http://localhost:8000``; credentials in it are not shown.
        prompts: Token ids of each prompt and the number of tokens to generate.

    Raises:
        UsageError: It is not the URL of a server.
        SpecforgeError: The server cannot be reached, is neither vLLM nor SGLang, or does not speculate.
    """
    return asyncio.run(_measure(Address.of(url).root, prompts))


async def _measure(server: Address, prompts: Sequence[TokenPrompt]) -> Measured:
    before = await read_counters(server)
    await _answer(server, prompts)
    found = (await read_counters(server)).since(before)
    if found is None:
        raise SpecforgeError(
            f"{server.url} answered without any draft; does it run with a draft or another speculative configuration?"
        )
    return found


async def _answer(server: Address, prompts: Sequence[TokenPrompt]) -> None:
    # A local server needs no key, but the client requires one.
    connection = Connection(server, ANSWER_SECONDS, _check)
    try:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=connection
        ) as client:
            listed = await client.models.with_raw_response.list()
            model = Models.model_validate_json(listed.content).data[0].id
            for tokens, number in prompts:
                await client.completions.with_raw_response.create(
                    model=model,
                    prompt=tokens,
                    max_tokens=number,
                    temperature=0,
                )
    except IndexError:
        raise SpecforgeError(f"{server.url} does not answer the probe's prompts: it lists no model") from None
    except OpenAIError as error:
        cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
        raise SpecforgeError(
            f"{server.url} does not answer the probe's prompts: {on_one_line(cause or error)}"
        ) from error


def _check(path: str, body: bytes) -> object:
    return (Models if path.endswith("/models") else _Completion).model_validate_json(body)
