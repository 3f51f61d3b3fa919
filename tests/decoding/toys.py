"""Markov chains as verifiers and tables as drafts: small enough to compute exact distributions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from enumeration import all_runs
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.decoding.settings import Verification
from specforge.decoding.verification import verify
from specforge.hookspecs import ProposalMethod
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer
from specforge.registry import installed
from specforge.sampling import RandomSource, Sampling
from specforge.verifier.features import Features

Distribution = dict[tuple[int, ...], float]


class TableDrafter(Drafter):
    """Its logits are a function of the last two tokens, [V, V, D]."""

    def __init__(self, table: Tensor, contexts: Sequence[tuple[int, int]], draft_ids: Tensor | None = None) -> None:
        self.table = table
        self.draft_ids = draft_ids
        self.contexts = [[context] for context in contexts]
        self.root = self._read([row[0] for row in self.contexts])

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        raise AssertionError("a toy drafts for one round")

    def select(self, rows: Tensor) -> None:
        raise AssertionError("a toy drafts for one round")

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        logits = []
        for row, (own, own_parents) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
            # The root's context comes before those of the nodes.
            new = [(self.contexts[row][parent + 1][1], token) for token, parent in zip(own, own_parents, strict=True)]
            self.contexts[row] += new
            logits.append(self._read(new))
        return torch.stack(logits)

    def _read(self, contexts: Sequence[tuple[int, int]]) -> Tensor:
        return torch.stack([self.table[context] for context in contexts])


@dataclass(frozen=True)
class Toy:
    """A verifier whose next token depends on the last two, and a draft for it.

    Attributes:
        verifier: Logits, [V, V, V].
        draft: Logits, [V, V, D].
        draft_ids: The verifier's ids of the draft tokens; None for the full vocabulary.
        recipe: The arguments of ``make_toy``, for messages.
    """

    verifier: Tensor = field(repr=False)
    draft: Tensor = field(repr=False)
    draft_ids: Tensor | None = None
    recipe: str = ""

    @property
    def size(self) -> int:
        return len(self.verifier)

    def drafter(self, *contexts: tuple[int, int]) -> TableDrafter:
        return TableDrafter(self.draft, contexts, self.draft_ids)

    def logits(self, proposal: Proposal, *contexts: tuple[int, int]) -> Tensor:
        """The verifier's logits at the root and after each node of a proposal, [B, 1 + N, V]."""
        rows = []
        for context, tokens, parents in zip(contexts, proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
            indices = [context]
            for token, parent in zip(tokens, parents, strict=True):
                indices.append((indices[parent + 1][1], token))
            rows.append(torch.stack([self.verifier[index] for index in indices]))
        return torch.stack(rows)

    def p(self, context: tuple[int, int], sampling: Sampling) -> list[float]:
        """Probabilities of the verifier's next token, by an independent implementation of sampling."""
        return filtered(self.verifier[context].tolist(), sampling)

    def q(self, context: tuple[int, int], sampling: Sampling) -> list[float]:
        """Probabilities of the draft's next token, over the verifier's vocabulary."""
        own = filtered(self.draft[context].tolist(), sampling)
        wide = [0.0] * self.size
        for token, probability in enumerate(own):
            wide[token if self.draft_ids is None else int(self.draft_ids[token])] = probability
        return wide

    def distribution(self, context: tuple[int, int], length: int, sampling: Sampling) -> Distribution:
        """The verifier's own distribution of the next tokens."""
        distribution: Distribution = {(): 1.0}
        for _ in range(length):
            distribution = {
                (*tokens, token): probability * more
                for tokens, probability in distribution.items()
                for token, more in enumerate(self.p(after(context, tokens), sampling))
                if more > 0
            }
        return distribution

    def path_probability(self, context: tuple[int, int], path: Sequence[int], sampling: Sampling) -> float:
        probability = 1.0
        for index, token in enumerate(path):
            probability *= self.p(after(context, path[:index]), sampling)[token]
        return probability


def after(context: tuple[int, int], tokens: Sequence[int]) -> tuple[int, int]:
    """The last two tokens after appending some."""
    both = (*context, *tokens)
    return both[-2], both[-1]


def filtered(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """Temperature, top-k and top-p in plain Python; one-hot at temperature 0."""
    if sampling.temperature == 0:
        return [float(token == logits.index(max(logits))) for token in range(len(logits))]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    weights = [math.exp((logit - max(logits)) / sampling.temperature) for logit in logits]
    kept = order[: sampling.top_k] if sampling.top_k else order
    if sampling.top_p < 1:
        mass, so_far, nucleus = sum(weights[token] for token in kept), 0.0, []
        for token in kept:
            # The fewest tokens with this much probability.
            if so_far >= sampling.top_p:
                break
            nucleus.append(token)
            so_far += weights[token] / mass
        kept = nucleus
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


@dataclass(frozen=True)
class Round:
    """Outcome of one round: the proposal, the path of accepted nodes, and the emitted tokens."""

    proposal: Proposal
    nodes: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass
class Rounds:
    """All outcomes of a proposal method and a verification on a toy."""

    toy: Toy
    config: TokenProposalConfig
    sampling: Sampling
    verification: Verification
    limit: int = 99
    prompt: tuple[int, ...] = ()
    _known: dict[tuple[int, int], list[tuple[Round, float]]] = field(default_factory=dict)

    @cached_property
    def proposer(self) -> type[Proposer[Any]]:
        return installed().load(installed().find(ProposalMethod, self.config.proposal_type), "proposer")

    def propose(self, context: tuple[int, int], rng: RandomSource) -> Proposal:
        proposer = self.proposer(self.config, self.sampling, rng)
        drafter = self.toy.drafter(context) if proposer.needs_draft else None
        proposal = proposer.propose([torch.tensor([*self.prompt, *context])], drafter)
        return proposal.within(torch.tensor([self.limit]))

    def verify(self, proposal: Proposal, logits: Tensor, rng: RandomSource) -> Round:
        verdict = verify(proposal, logits, self.sampling, self.verification, rng)
        nodes = verdict.nodes[0, : int(verdict.counts)].tolist()
        parent = -1
        for node in nodes:
            assert proposal.parents[0, node] == parent, "the accepted nodes are not a path"
            parent = node
        return Round(proposal, tuple(nodes), (*proposal.tokens[0, nodes].tolist(), int(verdict.next_tokens)))

    def everything(self, context: tuple[int, int]) -> list[tuple[Round, float]]:
        if context not in self._known:
            self._known[context] = list(self._all(context))
        return self._known[context]

    def _all(self, context: tuple[int, int]) -> Iterator[tuple[Round, float]]:
        for proposal, drawn in all_runs(partial(self.propose, context)):
            logits = self.toy.logits(proposal, context)
            for outcome, probability in all_runs(partial(self.verify, proposal, logits)):
                yield outcome, drawn * probability

    def expected_accepted(self, context: tuple[int, int]) -> float:
        return sum(len(outcome.nodes) * probability for outcome, probability in self.everything(context))

    def distribution(self, context: tuple[int, int], length: int, rounds: int = 1) -> Distribution:
        """The distribution of the next tokens after ``rounds`` rounds, completed by the verifier without a draft."""
        if rounds == 0:
            return self.toy.distribution(context, length, self.sampling)
        emitted: Distribution = defaultdict(float)
        for outcome, probability in self.everything(context):
            emitted[outcome.tokens[:length]] += probability
        distribution: Distribution = defaultdict(float)
        for tokens, probability in emitted.items():
            rest = self.distribution(after(context, tokens), length - len(tokens), rounds - 1)
            for more, further in rest.items():
                distribution[tokens + more] += probability * further
        return distribution


def largest_difference(first: Distribution, second: Distribution) -> float:
    return max(abs(first.get(tokens, 0.0) - second.get(tokens, 0.0)) for tokens in {*first, *second})


def make_toy(seed: int, size: int, kind: str, sharpness: float = 1.5, draft_size: int | None = None) -> Toy:
    """Create a toy; its draft is unrelated to the verifier (random), equal (perfect), similar (close) or opposite."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, size, size)
    verifier = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    draft = {
        "random": sharpness * noise,
        "perfect": verifier,
        "close": verifier + 0.5 * noise,
        "bad": -2 * verifier,
    }[kind]
    recipe = f"make_toy({seed}, {size}, {kind!r}, {sharpness}, {draft_size})"
    if draft_size is None:
        return Toy(verifier, draft, recipe=recipe)
    draft_ids = torch.randperm(size, generator=generator)[:draft_size].sort().values
    return Toy(verifier, draft[..., draft_ids], draft_ids, recipe)


def all_contexts(toy: Toy) -> list[tuple[int, int]]:
    return list(product(range(toy.size), repeat=2))
