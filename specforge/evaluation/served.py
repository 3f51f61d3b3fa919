"""What serving engines were measured to do, as plain data."""

from __future__ import annotations

from pydantic import Field

from specforge.evaluation.result import Result


class Percentiles(Result):
    """Times of responses in milliseconds.

    Attributes:
        p50: Half of the responses took at most this time.
        p90: 90 % did.
        p99: 99 % did.
    """

    p50: float
    p90: float
    p99: float


class ServedMeasurement(Result):
    """One server on one prompt set, or on all of them, at one concurrency.

    Attributes:
        prompt_set: Name of the prompt set; ``"all"`` for all of them.
        concurrency: Number of requests in flight.
        responses: Number of responses.
        tokens: Number of their tokens.
        seconds: From the first request to the last response.
        tokens_per_second: Tokens of all responses per second, prefill included.
        request_tokens_per_second: Tokens per second of one request after its first token.
        first_token: Time to the first token.
        per_token: Time per token after the first one, by response.
        whole: Time to the last token.
        acceptance_length: Tokens per round by the server's counters; None without speculation.
        accept_rate_pos: Share of the rounds that accepted at least k = 1, 2, ... tokens; empty if not reported.
        num_drafts: Number of rounds; None if not reported.
        other_tokens: Tokens that the server generated for other clients in the meantime.
        speedup: ``tokens_per_second`` relative to the server without speculation; None without such a server.
    """

    prompt_set: str
    concurrency: int
    responses: int
    tokens: int
    seconds: float
    tokens_per_second: float
    request_tokens_per_second: float
    first_token: Percentiles
    per_token: Percentiles
    whole: Percentiles
    acceptance_length: float | None = None
    accept_rate_pos: list[float] = Field(default_factory=list)
    num_drafts: int | None = None
    other_tokens: int = 0
    speedup: float | None = None

    @property
    def tokens_per_round(self) -> float:
        """Tokens per round that were sent; 1 without speculation.

        Counters, and so ``acceptance_length``, also count what the last round accepts after the end of a response.
        """
        if self.num_drafts is None:
            return self.acceptance_length or 1.0
        # The first token of a response comes from the prefill.
        return (self.tokens - self.responses + self.other_tokens) / self.num_drafts

    @property
    def round_milliseconds(self) -> float:
        """Mean time of a round; of a token without speculation."""
        return 1000 * self.tokens_per_round / self.request_tokens_per_second


class ServerResult(Result):
    """One server.

    Attributes:
        url: Its URL, without credentials.
        engine: Name of the engine.
        is_baseline: Whether it is the one without speculation.
        draft_tokens: Number K of tokens that it drafts per round; None if unknown or without speculation.
        measurements: By concurrency and prompt set; with several prompt sets, also over all of them.
    """

    url: str
    engine: str
    is_baseline: bool
    draft_tokens: int | None
    measurements: list[ServedMeasurement]

    def at(self, concurrency: int) -> list[ServedMeasurement]:
        """Return the measurements at a concurrency; the last one is over all prompt sets."""
        return [one for one in self.measurements if one.concurrency == concurrency]


class ExpectedSpeed(Result):
    """What to expect of K drafted tokens.

    Attributes:
        draft_tokens: K.
        acceptance_length: Tokens per round.
        round_milliseconds: Time of a round.
        speedup: Decoding speed relative to the server without speculation; None without such a server.
        measured_speedup: The same as measured; None if no server drafts K tokens.
    """

    draft_tokens: int
    acceptance_length: float
    round_milliseconds: float
    speedup: float | None
    measured_speedup: float | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one request after its first token."""
        return 1000 * self.acceptance_length / self.round_milliseconds


class Expectation(Result):
    """What numbers of drafted tokens are expected to give at one concurrency.

    Attributes:
        concurrency: Number of requests in flight.
        fixed_milliseconds: Time of a round besides its drafted tokens, a of a + b K.
        token_milliseconds: Time of each drafted token, b of a + b K.
        fitted_to: The K whose measured times a and b are fitted to; 0 is the server without speculation.
        acceptance: Where the acceptance lengths come from.
        lengths: For K = 1, 2, ...
    """

    concurrency: int
    fixed_milliseconds: float
    token_milliseconds: float
    fitted_to: list[int]
    acceptance: str
    lengths: list[ExpectedSpeed]

    @property
    def best(self) -> ExpectedSpeed:
        """The K with the most tokens per second."""
        return max(self.lengths, key=lambda one: one.tokens_per_second)


class Served(Result):
    """Servers, measured on the same prompts.

    Attributes:
        model: The servers' name for the model.
        concurrencies: Numbers of requests in flight, ascending.
        servers: The servers, in the given order; the one without speculation is last.
        expectations: By concurrency; empty if the servers' number of draft tokens is unknown.
    """

    model: str
    concurrencies: list[int]
    servers: list[ServerResult]
    expectations: list[Expectation] = Field(default_factory=list)
