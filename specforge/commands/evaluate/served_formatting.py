"""Formatting of servers' figures, for both terminal and page."""

from __future__ import annotations

from specforge.commands.evaluate.formatting import UNKNOWN, decimal
from specforge.evaluation.served import Expectation, ExpectedSpeed, Percentiles, Served, ServedMeasurement, ServerResult

FEW_ROUNDS_OF_LOAD = 2  # responses for each request in flight, below which the load is not held for long
MEANS_ONLY = "SGLang"


def server_name(server: ServerResult) -> str:
    """Return a server's display name with its number of drafted tokens, such as ``localhost:8000, K=3``."""
    drafted = 0 if server.is_baseline else server.draft_tokens
    host = server.url.partition("://")[2].removesuffix("/v1")
    return f"{host}, K={'?' if drafted is None else drafted}"


def figures(measured: ServedMeasurement) -> dict[str, str]:
    """Return the figures of a measurement by display name."""
    return {
        "Acceptance length": UNKNOWN if measured.acceptance_length is None else decimal(measured.acceptance_length),
        "Tokens/s": decimal(measured.tokens_per_second, 1),
        "Speedup": speedup(measured.speedup),
        "First token, ms": percentiles(measured.first_token),
        "Per token, ms": percentiles(measured.per_token, 1),
        "Whole, ms": percentiles(measured.whole),
    }


def percentiles(times: Percentiles, digits: int = 0) -> str:
    """Return percentiles as ``50 % / 90 % / 99 %``."""
    return " / ".join(decimal(value, digits) for value in (times.p50, times.p90, times.p99))


def speedup(value: float | None) -> str:
    """Return a speedup such as ``1.85×``, or a dash if it is unknown."""
    return UNKNOWN if value is None else f"{decimal(value)}×"


def requests(concurrency: int) -> str:
    """Return a concurrency in words."""
    return f"{concurrency:,} request{'s' * (concurrency > 1)} at a time"


def advice(expected: Expectation) -> str:
    """Return which number of tokens to draft, and what to expect of it, in one sentence."""
    best = expected.best
    at = f"At {requests(expected.concurrency)}"
    speed = f"{decimal(best.tokens_per_second, 1)} tokens/s per request"
    if best.speedup is None:
        return f"{at}: draft {_tokens(best)}, and expect {speed}"
    if best.speedup <= 1:
        return f"{at}: do not speculate; the best is {_tokens(best)} with {speedup(best.speedup)} of the speed without"
    seen = "not measured" if best.measured_speedup is None else f"measured: {speedup(best.measured_speedup)}"
    return f"{at}: draft {_tokens(best)}, and expect {speedup(best.speedup)} the speed without ({seen}), {speed}"


def basis(expected: Expectation) -> str:
    """Return what an expectation is computed from."""
    fitted = ", ".join(map(str, expected.fitted_to))
    return (
        f"{requests(expected.concurrency)}: a round takes {decimal(expected.fixed_milliseconds)} + "
        f"{decimal(expected.token_milliseconds)} K ms, by the times measured at K = {fitted}; acceptance lengths by "
        f"{expected.acceptance}"
    )


def expected_cell(expected: Expectation, drafted: int) -> str:
    """Return the speed to expect of a number of drafted tokens, and the measured one."""
    one = expected.lengths[drafted - 1] if drafted <= len(expected.lengths) else None
    if one is None:
        return UNKNOWN
    text = f"{decimal(one.tokens_per_second, 1)}/s" if one.speedup is None else speedup(one.speedup)
    text += " *" if one is expected.best else ""
    return text if one.measured_speedup is None else f"{text} ({decimal(one.measured_speedup)})"


def warnings(served: Served | None) -> list[str]:
    """Return what a reader of servers' figures must know before them, one sentence each."""
    if served is None:
        return []
    lines = []
    for server in served.servers:
        name = server_name(server)
        few = {one.concurrency for one in server.measurements if one.responses < FEW_ROUNDS_OF_LOAD * one.concurrency}
        if few and server is served.servers[0]:
            shown = ", ".join(map(str, sorted(few)))
            lines.append(
                f"Some prompt sets have fewer responses than {FEW_ROUNDS_OF_LOAD} for each of {shown} requests at a "
                "time: the load falls towards the end of such a run, so that its speed is not that of the full load"
            )
        if others := sum(one.other_tokens for one in server.measurements if one.prompt_set != "all"):
            lines.append(
                f"{name} generated {others:,} tokens for other clients in the meantime; speeds and acceptance are "
                "those of both"
            )
        if server.engine == MEANS_ONLY and not server.is_baseline:
            lines.append(
                f"{name} is {MEANS_ONLY}, which reports the mean acceptance length since its start and no rates: "
                "restart it before a measurement"
            )
    if any(0 in one.fitted_to for one in served.expectations):
        lines.append(
            "Only one number of drafted tokens was measured. What a round with speculation costs besides its drafted "
            "tokens is not known from it, so fewer tokens are expected to be faster than they are, and more to be "
            "slower: measure a second --endpoint"
        )
    return lines


def _tokens(one: ExpectedSpeed) -> str:
    return f"{one.draft_tokens} token{'s' * (one.draft_tokens > 1)}"
