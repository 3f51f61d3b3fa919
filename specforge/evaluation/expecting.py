"""The speed to expect of each number K of drafted tokens, from measured times of rounds and acceptance lengths.

A round yields tau(K) tokens in time t(K), and without speculation a token takes t_0, so that drafting K tokens is
tau(K) t_0 / t(K) times as fast. With a draft of c times the verifier's time per pass and t(K) = (1 + c K) t_0, this is
Theorem 3.8 of Leviathan et al. (https://arxiv.org/abs/2211.17192) without its assumption that every token is accepted
equally often. A server's t(K) is measured at some K and interpolated as a + b K; tau(K) is exact by replay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specforge.evaluation.served import Expectation, ExpectedSpeed, ServedMeasurement, ServerResult


def expectations(
    servers: Sequence[ServerResult], concurrencies: Sequence[int], replayed: Sequence[float]
) -> list[Expectation]:
    """Return what to expect at each concurrency.

    Args:
        servers: The measured servers.
        concurrencies: The measured numbers of requests in flight.
        replayed: Acceptance lengths with chains of K = 1, 2, ... tokens by replay; empty if unknown.

    Returns:
        By concurrency; empty if the time of a round is known for fewer than two K.
    """
    drafting = [one for one in servers if one.draft_tokens is not None]
    baseline = next((one for one in servers if one.is_baseline), None)
    found = []
    for concurrency in concurrencies:
        speeds = [(one.draft_tokens or 0, one.at(concurrency)[-1]) for one in drafting]
        plain = None if baseline is None else baseline.at(concurrency)[-1]
        if (one := _expectation(concurrency, speeds, plain, replayed)) is not None:
            found.append(one)
    return found


def modelled_speedups(acceptance_lengths: Sequence[float], draft_cost: float, passes: int | None) -> list[float]:
    """Return the speedups of K = 1, 2, ... drafted tokens, tau(K) / (1 + c x passes of the draft).

    Args:
        acceptance_lengths: tau(K) for each K.
        draft_cost: Time c of a pass of the draft, relative to one of the verifier, which is assumed to take the same
            time for K + 1 tokens as for one.
        passes: Number of passes of the draft in a round; None for one per drafted token.
    """
    return [tau / (1 + draft_cost * (passes or drafted)) for drafted, tau in enumerate(acceptance_lengths, start=1)]


def _expectation(
    concurrency: int,
    speeds: Sequence[tuple[int, ServedMeasurement]],
    plain: ServedMeasurement | None,
    replayed: Sequence[float],
) -> Expectation | None:
    times = [(drafted, one.round_milliseconds) for drafted, one in speeds]
    if len({drafted for drafted, _ in times}) == 1 and plain is not None:
        times.append((0, plain.round_milliseconds))
    if len({drafted for drafted, _ in times}) < 2:
        return None
    fixed, per_token = _line(times)
    lengths, source = (replayed, "replay of the draft") if replayed else _by_rates(speeds)
    measured = {drafted: _speedup(one, plain) for drafted, one in speeds}
    expected = []
    for drafted, tau in enumerate(lengths, start=1):
        milliseconds = fixed + per_token * drafted
        expected.append(
            ExpectedSpeed(
                draft_tokens=drafted,
                acceptance_length=tau,
                round_milliseconds=milliseconds,
                speedup=None if plain is None else tau * plain.round_milliseconds / milliseconds,
                measured_speedup=measured.get(drafted),
            )
        )
    if not expected:
        return None
    return Expectation(
        concurrency=concurrency,
        fixed_milliseconds=fixed,
        token_milliseconds=per_token,
        fitted_to=sorted({drafted for drafted, _ in times}),
        acceptance=source,
        lengths=expected,
    )


def _speedup(measured: ServedMeasurement, plain: ServedMeasurement | None) -> float | None:
    return None if plain is None else measured.request_tokens_per_second / plain.request_tokens_per_second


def _line(times: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit a + b K by least squares, with neither a nor b below 0, which no time is."""
    drafted, milliseconds = np.array(times).T
    per_token, fixed = np.polyfit(drafted, milliseconds, 1)
    if per_token < 0:
        return float(milliseconds.mean()), 0.0
    if fixed < 0:
        return 0.0, float(milliseconds @ drafted / (drafted @ drafted))
    return float(fixed), float(per_token)


def _by_rates(speeds: Sequence[tuple[int, ServedMeasurement]]) -> tuple[list[float], str]:
    """Return the acceptance lengths of shorter chains by the rates of the longest one, whose rounds begin elsewhere."""
    drafted, longest = max(speeds, key=lambda one: one[0])
    counted = 1 + np.cumsum(longest.accept_rate_pos)
    # As many of the counted tokens are sent as in the rounds of the longest chain.
    lengths = (counted * (longest.tokens_per_round / (longest.acceptance_length or 1.0))).tolist()
    return lengths, f"rates by position of the server that drafts {drafted}"
