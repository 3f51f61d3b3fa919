"""How a running server accepts on given prompts: vLLM by its metrics, SGLang by its server info."""

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

# What a page of counters and an answer to a prompt may take.
SECONDS, ANSWER_SECONDS = 30.0, 600.0
# One line of a Prometheus page: a counter of vLLM's speculative decoding, its labels and its value.
COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)(?:_total)?(?:\{(.*)\})?\s+([\d.eE+-]+)$", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')
Asked = tuple[list[int], int]  # a prompt, and how many tokens it is to be answered with


@dataclass(frozen=True)
class Measured:
    """How a server accepts.

    Attributes:
        engine: Name of the server.
        acceptance_length: Tokens a pass of the verifier.
        chain: Tokens that it drafts in a round; None where it does not tell.
        accept_rates: Share of the rounds that accept at least k = 1, 2, ... tokens; empty where it does not tell.
    """

    engine: str
    acceptance_length: float
    chain: int | None
    accept_rates: list[float] = field(default_factory=list)


class _Completion(Strict):
    """An answer to a prompt; what it says does not matter."""

    choices: Annotated[list[dict[str, Any]], Field(min_length=1)]


class _State(Strict):
    """What one process of SGLang counts."""

    avg_spec_accept_length: Annotated[float, Field(ge=0, le=1000)] | None = None


class _ServerInfo(Strict):
    """What SGLang tells."""

    internal_states: list[_State] | None = None
    speculative_num_steps: int | None = None


def measure(url: str, prompts: Sequence[Asked]) -> Measured:
    """Let a server answer prompts at temperature 0, and read what it counts.

    Args:
        url: Address of the server, such as ``http://localhost:8000``; a name and password in it are not shown.
        prompts: The tokens of each, and how many are asked for.

    Raises:
        UsageError: It is no address of a server.
        SpecforgeError: The server cannot be reached, answers otherwise than the two do, or does not speculate.
    """
    address = Address.of(url)
    return asyncio.run(_measure(Address(address.url.removesuffix("/v1"), address.credentials), prompts))


async def _measure(server: Address, prompts: Sequence[Asked]) -> Measured:
    if await _get(server, "/get_server_info") is not None:
        await _answer(server, prompts)
        return _from_server_info(await _get(server, "/get_server_info") or "{}", server.url)
    before = await _counters(server)
    await _answer(server, prompts)
    counted = {name: value - before.get(name, 0.0) for name, value in (await _counters(server)).items()}
    rounds = counted.get("drafts", 0.0)
    if rounds <= 0:
        raise SpecforgeError(
            f"{server.url} answered without drafting once; is it served with a speculative configuration?"
        )
    positions = sorted((name for name in counted if isinstance(name, int)), key=int)
    return Measured(
        "vLLM",
        1 + counted.get("accepted_tokens", 0.0) / rounds,
        round(counted["draft_tokens"] / rounds) if "draft_tokens" in counted else None,
        [counted[position] / rounds for position in positions],
    )


async def _answer(server: Address, prompts: Sequence[Asked]) -> None:
    # A local server asks for no key, but the client insists on one.
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
    """Return vLLM's counters, summed over its engines: by name, those by position under its number."""
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
            raise SpecforgeError(f"{server.url}/metrics: {name} is {on_one_line(number)}, which counts nothing")
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
        told = on_one_line(describe_invalid(error))
        raise SpecforgeError(f"{url}/get_server_info is not what SGLang tells: {told}") from None
    lengths = [one.avg_spec_accept_length for one in info.internal_states or [] if one.avg_spec_accept_length]
    if not lengths:
        raise SpecforgeError(f"{url}/get_server_info says nothing of acceptance; is it served with a draft?")
    # A mean since the server was started: other requests count as well.
    return Measured("SGLang", sum(lengths) / len(lengths), info.speculative_num_steps)


async def _get(server: Address, path: str) -> str | None:
    """Return what a server says at a path; None if it knows no such one."""
    try:
        async with Connection(server, SECONDS) as connection:
            answer = await connection.get(f"{server.url}{path}")
    except RequestError as error:
        raise SpecforgeError(
            f"{server.url}{path} cannot be read: {on_one_line(error)}; is the server running there?"
        ) from error
    return answer.text if answer.is_success else None
