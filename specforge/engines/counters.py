"""Counters of a running server's speculation: vLLM's metrics, or SGLang's server info."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, ValidationError

from specforge.engines.connection import Address, Connection, RequestError, Strict, on_one_line
from specforge.errors import SpecforgeError, describe_invalid

# Seconds allowed for a page of counters.
SECONDS = 30.0
# One line of a Prometheus page: a counter of vLLM, its labels and its value.
COUNTER = re.compile(
    r"^vllm:(spec_decode_num_\w+?|generation_tokens)(?:_total)?(?:\{(.*)\})?\s+([\d.eE+-]+)$", re.MULTILINE
)
POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Measured:
    """A server's acceptance between two readings of its counters.

    Attributes:
        engine: Name of the server.
        acceptance_length: Tokens per verifier forward pass.
        chain: Draft tokens per round; None if the server does not report it.
        accept_rates: Share of rounds that accept at least k = 1, 2, ... tokens; empty if not reported.
        rounds: Number of rounds; None if not reported.
    """

    engine: str
    acceptance_length: float
    chain: int | None
    accept_rates: list[float] = field(default_factory=list)
    rounds: int | None = None


@dataclass(frozen=True)
class Counters:
    """A reading of a server's counters, which only grow.

    Attributes:
        engine: Name of the server.
        rounds: Number of rounds.
        draft_tokens: Number of proposed tokens; None if not reported.
        accepted_tokens: Number of accepted tokens.
        accepted_at: Number of rounds that accepted at least k = 1, 2, ... tokens.
        generated_tokens: Number of tokens of all responses; None if not reported.
        mean: What a server reports that has only means since its start; None if it counts, or has not speculated.
    """

    engine: str
    rounds: float = 0.0
    draft_tokens: float | None = None
    accepted_tokens: float = 0.0
    accepted_at: tuple[float, ...] = ()
    generated_tokens: float | None = None
    mean: Measured | None = None

    def since(self, before: Counters) -> Measured | None:
        """Return the acceptance since an earlier reading; None if there was no round in between."""
        rounds = self.rounds - before.rounds
        if self.mean is not None or rounds <= 0:
            return self.mean
        earlier = (*before.accepted_at, *(0.0 for _ in self.accepted_at[len(before.accepted_at) :]))
        return Measured(
            self.engine,
            1 + (self.accepted_tokens - before.accepted_tokens) / rounds,
            None if self.draft_tokens is None else round((self.draft_tokens - (before.draft_tokens or 0.0)) / rounds),
            [(now - then) / rounds for now, then in zip(self.accepted_at, earlier, strict=True)],
            round(rounds),
        )


class _State(Strict):
    """Counters of one SGLang process."""

    avg_spec_accept_length: Annotated[float, Field(ge=0, le=1000)] | None = None


class _ServerInfo(Strict):
    """SGLang's server info."""

    internal_states: list[_State] | None = None
    speculative_num_steps: int | None = None


async def read_counters(server: Address) -> Counters:
    """Read a server's counters.

    Args:
        server: Root address of the server, without ``/v1``.

    Raises:
        SpecforgeError: The server cannot be reached, is neither vLLM nor SGLang, or its counters are not numbers.
    """
    info = await _get(server, "/get_server_info")
    if info is not None:
        return _from_server_info(info, server.url)
    page = await _get(server, "/metrics")
    if page is None or "vllm:" not in page:
        raise SpecforgeError(
            f"{server.url} has neither vLLM's /metrics nor SGLang's /get_server_info; vLLM counts nothing with "
            "--disable-log-stats"
        )
    return _from_metrics(page, server.url)


def _from_metrics(page: str, url: str) -> Counters:
    """Read vLLM's counters, summed over its engines."""
    found: dict[str, float] = defaultdict(float)
    accepted: dict[int, float] = defaultdict(float)
    for name, labels, number in COUNTER.findall(page):
        try:
            value = float(number)
        except ValueError:
            value = math.inf
        if not 0 <= value < math.inf:
            shown = name.removeprefix("spec_decode_num_")
            raise SpecforgeError(f"{url}/metrics: {shown} is {on_one_line(number)}, which is not a count")
        position = POSITION.search(labels)
        if name == "spec_decode_num_accepted_tokens_per_pos" and position:
            accepted[int(position[1])] += value
        elif not name.endswith("_created"):
            found[name] += value
    return Counters(
        "vLLM",
        found.get("spec_decode_num_drafts", 0.0),
        found.get("spec_decode_num_draft_tokens"),
        found.get("spec_decode_num_accepted_tokens", 0.0),
        tuple(accepted[position] for position in sorted(accepted)),
        found.get("generation_tokens"),
    )


def _from_server_info(body: str, url: str) -> Counters:
    """Read SGLang's mean since the server started, in which other requests count too."""
    try:
        info = _ServerInfo.model_validate_json(body)
    except ValidationError as error:
        reason = on_one_line(describe_invalid(error))
        raise SpecforgeError(f"{url}/get_server_info is not SGLang's: {reason}") from None
    lengths = [one.avg_spec_accept_length for one in info.internal_states or [] if one.avg_spec_accept_length]
    if not lengths:
        return Counters("SGLang")
    return Counters("SGLang", mean=Measured("SGLang", sum(lengths) / len(lengths), info.speculative_num_steps))


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
