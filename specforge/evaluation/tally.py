"""Counts of rounds, and the figures computed from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from specforge.decoding.agreement import Agreement
from specforge.decoding.loop import Emission, Times
from specforge.decoding.replay import Rounds, figures
from specforge.evaluation.results import Measurement, Span

# Length of a span of the response in tokens, for acceptance by position in the text.
SPAN = 32
RESAMPLES = 2000


@dataclass(frozen=True)
class Round:
    """One round: its start within the response, and its numbers of proposed and accepted tokens."""

    begin: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Response:
    """One response of a contender.

    Attributes:
        conversation: Key of its conversation, the unit of resampling.
        tokens: Its tokens.
        rounds: Its rounds; the first token comes from the prefill.
        identical: Whether it equals the response without speculation; None if not compared.
    """

    conversation: tuple[str, int]
    tokens: list[int]
    rounds: list[Round]
    identical: bool | None

    @classmethod
    def of(cls, conversation: tuple[str, int], emissions: Sequence[Emission], alone: Sequence[int] | None) -> Self:
        """Build a response from its emissions, and compare it with the one without speculation."""
        tokens: list[int] = []
        rounds = []
        for emission in emissions:
            if emission.drafted is not None:
                rounds.append(Round(len(tokens), emission.drafted, emission.accepted))
            tokens += emission.tokens
        return cls(conversation, tokens, rounds, None if alone is None else tokens == list(alone))


@dataclass
class RoundTally:
    """All counts of one contender on one prompt set.

    Attributes:
        responses: Its responses.
        times: Its times.
        alone_tokens: Number of tokens that decoding without speculation yielded on the same prompts.
        alone_seconds: Seconds that it took.
        chains: Replayed rounds of chains of K = 1, 2, ... tokens.
        agreement: Comparison of its rounds with a replay of its text; empty if the text does not determine them.
    """

    responses: list[Response] = field(default_factory=list)
    times: Times = field(default_factory=Times)
    alone_tokens: int = 0
    alone_seconds: float = 0.0
    chains: list[Rounds] = field(default_factory=list)
    agreement: Agreement = field(default_factory=Agreement)

    def __add__(self, other: RoundTally) -> RoundTally:
        times = Times(*(a + b for a, b in zip(vars(self.times).values(), vars(other.times).values(), strict=True)))
        return RoundTally(
            self.responses + other.responses,
            times,
            self.alone_tokens + other.alone_tokens,
            self.alone_seconds + other.alone_seconds,
            self.chains + other.chains,
            self.agreement + other.agreement,
        )

    def measurement(self, prompt_set: str) -> Measurement:
        """Return the figures."""
        rounds = [one for response in self.responses for one in response.rounds]
        accepted = np.array([one.accepted for one in rounds], dtype=np.int64)
        drafted = sum(one.drafted for one in rounds)
        yielded = int(accepted.sum()) + len(rounds)
        longest = int(accepted.max(initial=0))
        reached = [int((accepted >= position).sum()) for position in range(1, longest + 1)]
        rates = figures(yielded, len(rounds), reached) if rounds else {"acceptance_length": 1.0}
        per_second = yielded / self.times.total if self.times.total else 0.0
        alone = self.alone_tokens / self.alone_seconds if self.alone_seconds else 0.0
        identical = [one.identical for one in self.responses if one.identical is not None]
        number = max(self.times.rounds, 1)
        return Measurement(
            prompt_set=prompt_set,
            responses=len(self.responses),
            tokens=sum(len(one.tokens) for one in self.responses),
            acceptance_length=rates["acceptance_length"],
            confidence_interval=self._confidence_interval(),
            accept_rate_pos=[rates[f"accept_rate_pos_{position}"] for position in range(1, longest + 1)],
            accept_rate_cond=[rates[f"accept_rate_cond_{position}"] for position in range(1, longest + 1)],
            histogram=np.bincount(accepted, minlength=1).tolist(),
            num_drafts=len(rounds),
            num_draft_tokens=drafted,
            num_accepted_tokens=int(accepted.sum()),
            draft_acceptance_rate=int(accepted.sum()) / drafted if drafted else 0.0,
            draft_milliseconds=1000 * self.times.draft / number,
            verifier_milliseconds=1000 * self.times.verifier / number,
            other_milliseconds=1000 * (self.times.total - self.times.draft - self.times.verifier) / number,
            tokens_per_second=per_second,
            tokens_per_second_alone=alone,
            speedup=per_second / alone if alone else 0.0,
            identical_responses=sum(identical) if identical else None,
            by_stretch=_by_stretch(rounds),
            by_chain_length=self._by_chain_length(),
            compared_rounds=self.agreement.rounds,
            differing_rounds=self.agreement.differing,
            difference=str(self.agreement) if self.agreement.differing else "",
        )

    def _confidence_interval(self) -> tuple[float, float] | None:
        """95 % interval of the acceptance length by resampling conversations, whose responses are not independent."""
        tokens: Counter[tuple[str, int]] = Counter()
        rounds: Counter[tuple[str, int]] = Counter()
        for response in self.responses:
            tokens[response.conversation] += sum(one.accepted + 1 for one in response.rounds)
            rounds[response.conversation] += len(response.rounds)
        counted = np.array([(tokens[key], rounds[key]) for key in tokens if rounds[key]], dtype=np.float64)
        if len(counted) < 2:
            return None
        drawn = np.random.default_rng(0).integers(len(counted), size=(RESAMPLES, len(counted)))
        sums = counted[drawn].sum(axis=1)
        low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
        return float(low), float(high)

    def _by_chain_length(self) -> list[float]:
        if not self.chains:
            return []
        tokens = torch.stack([one.tokens for one in self.chains]).sum()
        rounds = torch.stack([one.rounds for one in self.chains]).sum(0)
        return [float(one) for one in tokens / rounds] if tokens else []


def _by_stretch(rounds: Sequence[Round]) -> list[Span]:
    drafts: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for one in rounds:
        drafts[one.begin // SPAN] += 1
        tokens[one.begin // SPAN] += one.accepted + 1
    return [
        Span(
            begin=number * SPAN,
            end=(number + 1) * SPAN,
            drafts=drafts[number],
            acceptance_length=tokens[number] / drafts[number],
        )
        for number in sorted(drafts)
    ]
