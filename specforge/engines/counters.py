"""Acceptance of a running server on given prompts: from vLLM's metrics or SGLang's server info."""

from __future__ import annotations

import asyncio
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import openai
from openai import AsyncOpenAI, OpenAIError
from pydantic import Field, ValidationError

from specforge.engines.connection import Address, Connection, Models, RequestError, Strict, on_one_line
from specforge.errors import SpecforgeError, describe_invalid

# Seconds allowed for a page of counters and for the response to a prompt.
SECONDS, ANSWER_SECONDS = 30.0, 600.0
# One line of a Prometheus page: a counter of vLLM's speculative decoding, its labels and its value.
COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)(?:_total)?(?:\{(.*)\})?\s+([\d.eE+-]+)$", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')
TokenPrompt = tuple[list[int], int]  # a prompt and the number of tokens to generate


@dataclass(frozen=True)
class Measured:
    """Measured acceptance of a server.

    Attributes:
        engine: Name of the server.
        acceptance_length: Tokens per verifier forward pass.
        chain: Draft tokens per round; None if the server does not report it.
        accept_rates: Share of rounds that accept at least k = 1, 2, ... tokens; empty if not reported.
    """

    engine: str
    acceptance_length: float
    chain: int | None
    accept_rates: list[float] = field(default_factory=list)


class _Completion(Strict):
    """A response to a prompt; its text does not matter."""

    choices: Annotated[list[dict[str, Any]], Field(min_length=1)]


class _State(Strict):
    """Counters of one SGLang process."""

    avg_spec_accept_length: Annotated[float, Field(ge=0, le=1000)] | None = None


class _ServerInfo(Strict):
    """SGLang's server info."""

    internal_states: list[_State] | None = None
    speculative_num_steps: int | None = None


def measure(url: str, prompts: Sequence[TokenPrompt]) -> Measured:
    """Send prompts to a server at temperature 0 and read its counters.

    Args:
        url: URL of the server, such as ``http://localhost:8000``; credentials in it are not shown.
        prompts: Token ids of each prompt and the number of tokens to generate.

    Raises:
        UsageError: It is not the URL of a server.
        SpecforgeError: The server cannot be reached, is neither vLLM nor SGLang, or does not speculate.
    """
    address = Address.of(url)
    return asyncio.run(_measure(Address(address.url.removesuffix("/v1"), address.credentials), prompts))


async def _measure(server: Address, prompts: Sequence[TokenPrompt]) -> Measured:
    if await _get(server, "/get_server_info") is not None:
        await _answer(server, prompts)
        return _from_server_info(await _get(server, "/get_server_info") or "{}", server.url)
    before = await _counters(server)
    await _answer(server, prompts)
    counted = {name: value - before.get(name, 0.0) for name, value in (await _counters(server)).items()}
    rounds = counted.get("drafts", 0.0)
    if rounds <= 0:
        raise SpecforgeError(f"{server.url} answered without any draft; does it run with a speculative configuration?")
    positions = sorted((name for name in counted if isinstance(name, int)), key=int)
    return Measured(
        "vLLM",
        1 + counted.get("accepted_tokens", 0.0) / rounds,
        round(counted["draft_tokens"] / rounds) if "draft_tokens" in counted else None,
        [counted[position] / rounds for position in positions],
    )


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


async def _counters(server: Address) -> dict[str | int, float]:
    """Return vLLM's counters by name, summed over its engines; counters by position are keyed by the position."""
    page = await _get(server, "/metrics")
    if page is None or "vllm:" not in page:
        raise SpecforgeError(f"{server.url} has neither vLLM's /metrics nor SGLang's /get_server_info")
    found: dict[str | int, float] = defaultdict(float)
    for name, labels, number in COUNTER.findall(page):
        try:
            value = float(number)
        except ValueError:
            value = math.inf
        if not 0 <= value < math.inf:
            raise SpecforgeError(f"{server.url}/metrics: {name} is {on_one_line(number)}, which is not a count")
        position = POSITION.search(labels)
        if name == "accepted_tokens_per_pos" and position:
            found[int(position[1])] += value
        elif not name.endswith("_created"):
            found[name] += value
    return dict(found)


def _from_server_info(body: str, url: str) -> Measured:
    try:
        info = _ServerInfo.model_validate_json(body)
    except ValidationError as error:
        reason = on_one_line(describe_invalid(error))
        raise SpecforgeError(f"{url}/get_server_info is not SGLang's: {reason}") from None
    lengths = [one.avg_spec_accept_length for one in info.internal_states or [] if one.avg_spec_accept_length]
    if not lengths:
        raise SpecforgeError(f"{url}/get_server_info reports no acceptance length; does it run with a draft?")
    # A mean since the server started: other requests count too.
    return Measured("SGLang", sum(lengths) / len(lengths), info.speculative_num_steps)


async def _get(server: Address, path: str) -> str | None:
    """Return the content of a path of a server; None if the path does not exist."""
    try:
        async with Connection(server, SECONDS) as connection:
            answer = await connection.get(f"{server.url}{path}")
    except RequestError as error:
        raise SpecforgeError(
            f"{server.url}{path} cannot be read: {on_one_line(error)}; is the server running there?"
        ) from error
    return answer.text if answer.is_success else None
