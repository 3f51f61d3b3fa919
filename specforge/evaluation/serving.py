"""Measuring of serving engines: the same prompts at several concurrencies, with and without speculation."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import numpy as np

from specforge.data.text.prompts import Conversation
from specforge.engines.connection import Address
from specforge.engines.counters import Measured
from specforge.engines.generation import GenerationSettings
from specforge.engines.load import Load, run_load, warm_up
from specforge.engines.timed import TimedEngine
from specforge.errors import SpecforgeError, UsageError
from specforge.evaluation.served import Percentiles, Served, ServedMeasurement, ServerResult

PromptSets = Mapping[str, Sequence[Conversation]]


@dataclass(frozen=True)
class ServedSettings:
    """Which servers are measured, and how.

    Attributes:
        endpoints: URLs of servers that speculate.
        baseline: URL of the same server without speculation; None if there is none.
        model: The servers' name for the model; None for the only one that each serves.
        concurrencies: Numbers of requests in flight, ascending.
        generation: Settings of the generation.
        timeout: Seconds allowed for a response.
    """

    endpoints: Sequence[str] = field(repr=False)
    baseline: str | None = field(repr=False)
    model: str | None
    concurrencies: Sequence[int]
    generation: GenerationSettings
    timeout: float

    @property
    def number_of_runs(self) -> int:
        """How often each prompt is answered."""
        return len(self.concurrencies) * (len(self.endpoints) + (self.baseline is not None))


def measure_served(settings: ServedSettings, prompt_sets: PromptSets, report: Callable[[int], object]) -> Served:
    """Measure servers.

    Each prompt set is a run of its own, since counters are those of the whole server. Servers alternate.

    Args:
        settings: The servers and how they are measured.
        prompt_sets: Conversations by name.
        report: Called with the number of new responses.

    Raises:
        UsageError: A URL is invalid or named twice, or a server does not serve the model.
        SpecforgeError: A server cannot be reached, fails, has no counters, or speculates although it should not, or
            does not although it should.
    """
    servers = [_Server(TimedEngine(Address.of(url), settings.timeout, "--endpoint")) for url in settings.endpoints]
    if settings.baseline is not None:
        address = Address.of(settings.baseline, "--baseline")
        servers.append(_Server(TimedEngine(address, settings.timeout, "--baseline"), is_baseline=True))
    urls = [one.engine.address.root.url for one in servers]
    if twice := next((url for url in urls if urls.count(url) > 1), None):
        raise UsageError(f"--endpoint, --baseline: {twice} is named twice")
    return asyncio.run(_measure(settings, servers, prompt_sets, report))


@dataclass
class _Server:
    engine: TimedEngine
    is_baseline: bool = False
    runs: dict[tuple[int, str], Load] = field(default_factory=dict)

    def check(self, load: Load) -> None:
        """Check that the server speculated, or did not, as it should."""
        found, url = load.after.since(load.before), self.engine.address.url
        if self.is_baseline and found is not None:
            raise SpecforgeError(f"--baseline {url} speculates; give a server without a draft")
        if not self.is_baseline and found is None:
            raise SpecforgeError(
                f"--endpoint {url} answered without any draft; does it run with a draft or another speculative "
                "configuration? A server without one is a --baseline"
            )

    def result(self, concurrencies: Sequence[int]) -> ServerResult:
        last = list(self.runs.values())[-1]
        found = last.after.since(last.before)
        measurements = []
        for concurrency in concurrencies:
            by_name = {name: load for (number, name), load in self.runs.items() if number == concurrency}
            measurements += [_measurement(name, concurrency, [load]) for name, load in by_name.items()]
            if len(by_name) > 1:
                measurements.append(_measurement("all", concurrency, list(by_name.values())))
        return ServerResult(
            url=self.engine.address.url,
            engine=last.after.engine,
            is_baseline=self.is_baseline,
            draft_tokens=None if found is None else found.chain,
            measurements=measurements,
        )


async def _measure(
    settings: ServedSettings, servers: list[_Server], prompt_sets: PromptSets, report: Callable[[int], object]
) -> Served:
    async with AsyncExitStack() as opened:
        for server in servers:
            await opened.enter_async_context(server.engine)
            await server.engine.choose_model(settings.model)
        salt = secrets.token_hex(8)  # the servers may have answered these prompts before this command
        everything = [one for conversations in prompt_sets.values() for one in conversations]
        for concurrency in settings.concurrencies:
            for server in servers:
                await warm_up(server.engine, everything, concurrency, settings.generation)
            for name, conversations in prompt_sets.items():
                for server in servers:
                    own_salt = f"{salt} {concurrency} {name}"
                    load = await run_load(
                        server.engine, conversations, concurrency, settings.generation, own_salt, report
                    )
                    server.check(load)
                    server.runs[concurrency, name] = load
    results = [one.result(settings.concurrencies) for one in servers]
    _compare(results)
    return Served(model=servers[0].engine.model, concurrencies=list(settings.concurrencies), servers=results)


def _compare(servers: Sequence[ServerResult]) -> None:
    """Set the speedups over the server without speculation."""
    baseline = next((one for one in servers if one.is_baseline), None)
    if baseline is None:
        return
    for server in servers:
        if not server.is_baseline:
            for one, plain in zip(server.measurements, baseline.measurements, strict=True):
                one.speedup = one.tokens_per_second / plain.tokens_per_second


def _measurement(name: str, concurrency: int, loads: list[Load]) -> ServedMeasurement:
    replies = [reply for load in loads for reply in load.replies]
    tokens, seconds = sum(one.tokens for one in replies), sum(load.seconds for load in loads)
    decoded = [one for one in replies if one.tokens > 1 and one.decoding > 0]
    decoding = sum(one.decoding for one in decoded)
    if not decoded:
        raise SpecforgeError(f"{name}: no response has two tokens that came at different times; raise --max_new_tokens")
    accepted = _pooled([load.after.since(load.before) for load in loads])
    return ServedMeasurement(
        prompt_set=name,
        concurrency=concurrency,
        responses=len(replies),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        request_tokens_per_second=sum(one.tokens - 1 for one in decoded) / decoding,
        first_token=_percentiles([one.first - one.sent for one in replies]),
        per_token=_percentiles([one.decoding / (one.tokens - 1) for one in decoded]),
        whole=_percentiles([one.last - one.sent for one in replies]),
        acceptance_length=None if accepted is None else accepted.acceptance_length,
        accept_rate_pos=[] if accepted is None else accepted.accept_rates,
        num_drafts=None if accepted is None else accepted.rounds,
        other_tokens=sum(map(_other_tokens, loads)),
    )


def _pooled(found: list[Measured | None]) -> Measured | None:
    """Pool the acceptance of several runs by their rounds; a server with means only has its last one."""
    known = [one for one in found if one is not None]
    if not known or known[-1].rounds is None:
        return known[-1] if known else None
    weights = np.array([one.rounds for one in known], dtype=np.float64)
    rates = np.zeros((len(known), max(len(one.accept_rates) for one in known)))
    for row, one in zip(rates, known, strict=True):
        row[: len(one.accept_rates)] = one.accept_rates
    return Measured(
        known[-1].engine,
        float(np.average([one.acceptance_length for one in known], weights=weights)),
        known[-1].chain,
        np.average(rates, axis=0, weights=weights).tolist(),
        int(weights.sum()),
    )


def _percentiles(seconds: list[float]) -> Percentiles:
    p50, p90, p99 = np.percentile(1000 * np.array(seconds), (50, 90, 99)).tolist()
    return Percentiles(p50=p50, p90=p90, p99=p99)


def _other_tokens(load: Load) -> int:
    """Return the tokens that the server generated for others; 0 if it does not count tokens."""
    after, before = load.after.generated_tokens, load.before.generated_tokens
    if after is None:
        return 0
    return max(0, round(after - (before or 0.0)) - sum(one.tokens for one in load.replies))


def reply_count(prompt_sets: PromptSets) -> int:
    """Return the number of replies that one run over all prompt sets takes."""
    return sum(len(one.turns) for conversations in prompt_sets.values() for one in conversations)
