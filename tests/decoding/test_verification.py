from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from enumeration import all_runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import Rounds, Toy, after, all_contexts, filtered, largest_difference, make_toy

from specforge.config import TokenProposalConfig
from specforge.decoding.settings import Verification
from specforge.decoding.verification import Verdict, is_lossy, verify
from specforge.errors import UsageError
from specforge.proposals import (
    BigramTokenProposalConfig,
    DynamicTreeTokenProposalConfig,
    GreedyTokenProposalConfig,
    PromptLookupTokenProposalConfig,
    SamplingTokenProposalConfig,
    StaticTreeTokenProposalConfig,
)
from specforge.proposals.proposal import Proposal
from specforge.sampling import RandomSource, Sampling

EXACT = 1e-9
CONTEXT = (0, 1)
WARM = Sampling(temperature=1.0)
GREEDY = Sampling(temperature=0.0)
TOKEN, BLOCK = Verification(method="token"), Verification(method="block")
KINDS = ["random", "bad", "close", "perfect"]
SAMPLINGS = [
    WARM,
    Sampling(temperature=0.6),
    Sampling(temperature=1.7, top_k=2),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.3, top_k=3, top_p=0.85),
]


def tree(first: int, others: int, depth: int, sampled: bool = False) -> StaticTreeTokenProposalConfig:
    return StaticTreeTokenProposalConfig(
        initial_branching_factor=first, branching_factor=others, depth=depth, sampled=sampled
    )


def dynamic(nodes: int, expansion: int, depth: int) -> DynamicTreeTokenProposalConfig:
    return DynamicTreeTokenProposalConfig(speculative_tokens=nodes, expansion_factor=expansion, depth=depth)


@st.composite
def toys(draw: st.DrawFn, sizes: tuple[int, ...] = (3, 4)) -> Toy:
    size = draw(st.sampled_from(sizes))
    draft_size = draw(st.none() | st.integers(1, size))
    sharpness = draw(st.sampled_from([0.3, 1.5, 6.0]))
    return make_toy(draw(st.integers(0, 10**6)), size, draw(st.sampled_from(KINDS)), sharpness, draft_size)


# Each with the sizes of vocabularies that it can be enumerated on quickly.
PROPOSALS: dict[str, tuple[TokenProposalConfig, Verification, tuple[int, ...]]] = {
    "sampled chain": (SamplingTokenProposalConfig(speculative_tokens=3), TOKEN, (3,)),
    "sampled token": (SamplingTokenProposalConfig(speculative_tokens=1), TOKEN, (3, 5)),
    "sampled chain, block": (SamplingTokenProposalConfig(speculative_tokens=3), BLOCK, (3,)),
    "sampled pair, block": (SamplingTokenProposalConfig(speculative_tokens=2), BLOCK, (4, 5)),
    "greedy chain": (GreedyTokenProposalConfig(speculative_tokens=3), TOKEN, (3, 4)),
    "greedy chain, block": (GreedyTokenProposalConfig(speculative_tokens=3), BLOCK, (3, 4)),
    "static tree": (tree(2, 2, 2), TOKEN, (3,)),
    "wide static tree": (tree(3, 1, 2), TOKEN, (3,)),
    "drawn siblings": (tree(3, 1, 1, sampled=True), TOKEN, (3, 4, 5)),
    "more siblings than tokens": (tree(9, 1, 1, sampled=True), TOKEN, (3, 4)),
    "drawn tree": (tree(2, 1, 2, sampled=True), TOKEN, (3, 4)),
    "dynamic tree": (dynamic(4, 2, 3), TOKEN, (3,)),
}


@pytest.mark.parametrize("name", PROPOSALS)
@settings(max_examples=6)
@given(data=st.data(), sampling=st.sampled_from(SAMPLINGS), missing=st.integers(0, 2))
def test_a_round_has_the_verifiers_own_distribution(
    name: str, data: st.DataObject, sampling: Sampling, missing: int
) -> None:
    config, verification, sizes = PROPOSALS[name]
    toy = data.draw(toys(sizes))
    depth = Rounds(toy, config, sampling, verification).proposer(config, sampling, RandomSource()).depth
    # If a sequence is nearly full, deeper nodes are dropped.
    rounds = Rounds(toy, config, sampling, verification, limit=max(1, depth - missing))
    distribution, own = rounds.distribution(CONTEXT, depth + 1), toy.distribution(CONTEXT, depth + 1, sampling)
    assert largest_difference(distribution, own) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_broad_drawn_trees_have_the_verifiers_own_distribution(kind: str) -> None:
    toy = make_toy(5, 3, kind, draft_size=None if kind == "close" else 2)
    rounds = Rounds(toy, tree(2, 2, 2, sampled=True), Sampling(temperature=0.8), TOKEN)
    assert largest_difference(rounds.distribution(CONTEXT, 3), toy.distribution(CONTEXT, 3, rounds.sampling)) < EXACT


@pytest.mark.parametrize("verification", [TOKEN, BLOCK], ids=["token", "block"])
def test_several_rounds_have_the_verifiers_own_distribution(verification: Verification) -> None:
    toy = make_toy(3, 3, "close", draft_size=2)
    rounds = Rounds(toy, SamplingTokenProposalConfig(speculative_tokens=2), WARM, verification)
    assert largest_difference(rounds.distribution(CONTEXT, 5, rounds=3), toy.distribution(CONTEXT, 5, WARM)) < EXACT


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=["warm", "cold", "top-k"])
def test_methods_without_a_draft_have_the_verifiers_own_distribution(sampling: Sampling, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    toy = make_toy(8, 4, "random")
    save_file({"successors": torch.tensor([1, 3, -1, 0])}, tmp_path / "table.safetensors")
    for config in (
        PromptLookupTokenProposalConfig(speculative_tokens=3),
        BigramTokenProposalConfig(speculative_tokens=3, table=str(tmp_path / "table.safetensors")),
    ):
        rounds = Rounds(toy, config, sampling, TOKEN, prompt=(0, 1, 3, 2, 2))
        for context in [(0, 1), (3, 2), (1, 0)]:
            assert largest_difference(rounds.distribution(context, 4), toy.distribution(context, 4, sampling)) < EXACT


@settings(max_examples=10)
@given(toy=toys((3, 4)), name=st.sampled_from(sorted(PROPOSALS)))
def test_at_temperature_0_a_round_follows_the_verifier(toy: Toy, name: str) -> None:
    config, verification, _ = PROPOSALS[name]
    for context in all_contexts(toy)[:4]:
        ((outcome, probability),) = Rounds(toy, config, GREEDY, verification).everything(context)
        assert probability == 1
        expected: tuple[int, ...] = ()
        for _ in outcome.tokens:
            index = after(context, expected)
            expected += (int(toy.verifier[index].argmax()),)
        assert outcome.tokens == expected


def test_at_temperature_0_the_deepest_possible_path_is_accepted() -> None:
    toy = make_toy(1, 4, "perfect")
    for config, depth in [
        (GreedyTokenProposalConfig(speculative_tokens=4), 4),
        (SamplingTokenProposalConfig(speculative_tokens=4), 4),
        (tree(2, 2, 3), 3),
        (tree(2, 2, 3, sampled=True), 3),
        (dynamic(8, 2, 3), 3),
    ]:
        ((outcome, _),) = Rounds(toy, config, GREEDY, TOKEN).everything(CONTEXT)
        assert len(outcome.nodes) == depth


@pytest.mark.parametrize(
    ("config", "verification"),
    [
        (SamplingTokenProposalConfig(speculative_tokens=2), TOKEN),
        (SamplingTokenProposalConfig(speculative_tokens=2), BLOCK),
        (tree(2, 1, 2, sampled=True), TOKEN),
    ],
    ids=["chain", "block", "tree"],
)
def test_a_perfect_draft_is_always_accepted(config: TokenProposalConfig, verification: Verification) -> None:
    for sampling in SAMPLINGS[1:3]:
        rounds = Rounds(make_toy(2, 3, "perfect"), config, sampling, verification)
        assert rounds.expected_accepted(CONTEXT) == pytest.approx(2, abs=EXACT)


@settings(max_examples=8)
@given(toy=toys((3,)), sampling=st.sampled_from(SAMPLINGS))
def test_expected_lengths_of_chains_are_those_of_the_formulas(toy: Toy, sampling: Sampling) -> None:
    length = 3
    token_length, block_length = 0.0, 0.0
    for index in range(1, length + 1):
        for path in product(range(toy.size), repeat=index):
            both = [
                (toy.p(after(CONTEXT, path[:at]), sampling)[token], toy.q(after(CONTEXT, path[:at]), sampling)[token])
                for at, token in enumerate(path)
            ]
            token_length += math.prod(min(p, q) for p, q in both)
            # Block verification: q of the path times the paper's p_i, the probability of getting here.
            drawn, survival = 1.0, 1.0
            for p, q in both:
                drawn *= q
                survival = min(1.0, survival * p / q) if q else 0.0
            block_length += drawn * survival
    config = SamplingTokenProposalConfig(speculative_tokens=length)
    by_token = Rounds(toy, config, sampling, TOKEN).expected_accepted(CONTEXT)
    by_block = Rounds(toy, config, sampling, BLOCK).expected_accepted(CONTEXT)
    assert by_token == pytest.approx(token_length, abs=EXACT)
    assert by_block == pytest.approx(block_length, abs=EXACT)
    assert by_block >= by_token - EXACT


def test_block_verification_can_accept_more() -> None:
    toy = make_toy(0, 3, "random")
    config = SamplingTokenProposalConfig(speculative_tokens=3)
    by_token, by_block = (
        Rounds(toy, config, WARM, verification).expected_accepted(CONTEXT) for verification in (TOKEN, BLOCK)
    )
    assert by_block > by_token + 0.01


@settings(max_examples=8)
@given(
    toy=toys((3,)),
    sampling=st.sampled_from(SAMPLINGS),
    config=st.sampled_from(
        [tree(2, 2, 2), tree(3, 1, 2), dynamic(3, 2, 3), GreedyTokenProposalConfig(speculative_tokens=3)]
    ),
)
def test_fixed_trees_are_accepted_as_far_as_the_verifier_goes(toy: Toy, sampling: Sampling, config: Any) -> None:
    rounds = Rounds(toy, config, sampling, TOKEN)
    everything = rounds.everything(CONTEXT)
    proposal = everything[0][0].proposal
    for outcome, _ in everything:
        assert torch.equal(outcome.proposal.tokens, proposal.tokens), "nothing is drawn"
    paths = [path_to(proposal, node) for node in range(proposal.tokens.shape[1])]
    expected = sum(toy.path_probability(CONTEXT, path, sampling) for path in paths)
    assert sum(len(outcome.nodes) * weight for outcome, weight in everything) == pytest.approx(expected, abs=EXACT)


@settings(max_examples=6)
@given(toy=toys((3, 4)), sampling=st.sampled_from(SAMPLINGS))
def test_siblings_drawn_without_replacement_are_accepted_as_in_recursive_rejection(
    toy: Toy, sampling: Sampling
) -> None:
    width = 2
    p, q = toy.p(CONTEXT, sampling), toy.q(CONTEXT, sampling)

    def accepted(r: list[float], q: list[float], tries: int) -> float:
        if tries == 0 or not any(q):
            return 0.0
        here = sum(map(min, r, q))
        left = [max(0.0, ours - other) for ours, other in zip(r, q, strict=True)]
        if not sum(left):
            return here
        left = [weight / sum(left) for weight in left]
        total = here
        for token, drawn in enumerate(q):
            rejected = max(0.0, drawn - r[token])
            if rejected <= 0:
                continue
            others = [0.0 if index == token else share for index, share in enumerate(q)]
            others = [weight / sum(others) for weight in others] if any(others) else others
            total += rejected * accepted(left, others, tries - 1)
        return total

    rounds = Rounds(toy, tree(width, 1, 1, sampled=True), sampling, TOKEN)
    assert rounds.expected_accepted(CONTEXT) == pytest.approx(accepted(p, q, width), abs=1e-7)


def path_to(proposal: Proposal, node: int) -> list[int]:
    tokens: list[int] = []
    while node >= 0:
        tokens.insert(0, int(proposal.tokens[0, node]))
        node = int(proposal.parents[0, node])
    return tokens


def accepted_paths(toy: Toy, proposal: Proposal, fits: Any) -> list[tuple[int, ...]]:
    """The longest paths whose nodes all fit, from the root down; the empty path if there is none."""
    paths: list[tuple[int, ...]] = [()]
    by_node: dict[int, tuple[int, ...]] = {-1: ()}
    for node, (token, parent) in enumerate(zip(proposal.tokens[0].tolist(), proposal.parents[0].tolist(), strict=True)):
        path_above = by_node.get(parent)
        if path_above is not None and fits(after(CONTEXT, path_to(proposal, parent)), token):
            by_node[node] = (*path_above, node)
            paths.append(by_node[node])
    longest = max(map(len, paths))
    return [path for path in paths if len(path) == longest]


@settings(max_examples=12)
@given(
    toy=toys((3, 4)),
    sampling=st.sampled_from(SAMPLINGS),
    thresholds=st.sampled_from([(0.09, 0.3), (0.3, 0.3), (0.4, 2.0), (1.0, 0.8)]),
    config=st.sampled_from([GreedyTokenProposalConfig(speculative_tokens=2), tree(2, 1, 2)]),
)
def test_typical_acceptance_is_as_defined(
    toy: Toy, sampling: Sampling, thresholds: tuple[float, float], config: Any
) -> None:
    epsilon, alpha = thresholds
    verification = Verification(method="typical", posterior_threshold=epsilon, posterior_alpha=alpha)

    def fits(context: tuple[int, int], token: int) -> bool:
        p = toy.p(context, sampling)
        entropy = -sum(probability * math.log(probability) for probability in p if probability)
        return p[token] > min(epsilon, alpha * math.exp(-entropy))

    everything = Rounds(toy, config, sampling, verification).everything(CONTEXT)
    allowed = accepted_paths(toy, everything[0][0].proposal, fits)
    next_tokens = [0.0] * toy.size
    for outcome, probability in everything:
        assert outcome.nodes in allowed
        assert outcome.nodes == everything[0][0].nodes
        next_tokens[outcome.tokens[-1]] += probability
    expected = toy.p(after(CONTEXT, everything[0][0].tokens[:-1]), sampling)
    assert next_tokens == pytest.approx(expected, abs=EXACT)


def test_typical_acceptance_takes_drawn_tokens_too() -> None:
    toy = make_toy(4, 3, "bad")
    verification = Verification(method="typical", posterior_threshold=1.0, posterior_alpha=1e-9)
    config = SamplingTokenProposalConfig(speculative_tokens=2)
    assert Rounds(toy, config, WARM, verification).expected_accepted(CONTEXT) == pytest.approx(2, abs=EXACT)


def test_typical_acceptance_is_exact_at_temperature_0() -> None:
    toy = make_toy(4, 4, "close")
    config = GreedyTokenProposalConfig(speculative_tokens=3)
    typical = Verification(method="typical", posterior_threshold=1e-9)
    for context in all_contexts(toy):
        ((outcome, _),) = Rounds(toy, config, GREEDY, typical).everything(context)
        ((other, _),) = Rounds(toy, config, GREEDY, TOKEN).everything(context)
        assert outcome.tokens == other.tokens


@settings(max_examples=20)
@given(
    toy=toys((3, 5)),
    accept_k=st.integers(1, 3),
    tolerance=st.sampled_from([0.0, 0.5, 2.0]),
)
@example(toy=make_toy(0, 5, "close"), accept_k=1, tolerance=0.0)
def test_tolerance_is_as_defined(toy: Toy, accept_k: int, tolerance: float) -> None:
    config = GreedyTokenProposalConfig(speculative_tokens=3, verifier_accept_k=accept_k, accept_tolerance=tolerance)

    def fits(context: tuple[int, int], token: int) -> bool:
        log_p = [math.log(probability) for probability in filtered(toy.verifier[context].tolist(), WARM)]
        rank = sum(each > log_p[token] for each in log_p)
        return rank < accept_k or max(log_p) - log_p[token] <= tolerance

    ((outcome, _),) = Rounds(toy, config, GREEDY, TOKEN).everything(CONTEXT)
    assert outcome.nodes in accepted_paths(toy, outcome.proposal, fits)
    assert outcome.tokens[-1] == int(toy.verifier[after(CONTEXT, outcome.tokens[:-1])].argmax())


def test_tolerance_accepts_more_tokens_of_a_bad_draft() -> None:
    toy = make_toy(7, 5, "random")

    def accepted(**tolerance: Any) -> int:
        config = GreedyTokenProposalConfig(speculative_tokens=3, **tolerance)
        return sum(
            len(Rounds(toy, config, GREEDY, TOKEN).everything(context)[0][0].nodes) for context in all_contexts(toy)
        )

    assert accepted() < accepted(verifier_accept_k=2) < accepted(verifier_accept_k=5) == 3 * 25
    assert accepted() < accepted(accept_tolerance=1.0) < accepted(accept_tolerance=99.0) == 3 * 25


@pytest.mark.parametrize(
    ("verification", "proposal", "lossy"),
    [
        (TOKEN, None, False),
        (BLOCK, SamplingTokenProposalConfig(), False),
        (TOKEN, GreedyTokenProposalConfig(), False),
        (TOKEN, StaticTreeTokenProposalConfig(sampled=True), False),
        (TOKEN, GreedyTokenProposalConfig(verifier_accept_k=2), True),
        (TOKEN, GreedyTokenProposalConfig(accept_tolerance=0.1), True),
        (Verification(method="typical"), DynamicTreeTokenProposalConfig(), True),
    ],
)
def test_lossy_settings_are_recognised(verification: Verification, proposal: Any, lossy: bool) -> None:
    assert is_lossy(verification, proposal) == lossy


def test_block_verification_rejects_sampled_trees() -> None:
    toy = make_toy(0, 3, "random")
    with pytest.raises(UsageError, match="block verification takes a chain"):
        Rounds(toy, tree(2, 1, 2, sampled=True), WARM, BLOCK).everything(CONTEXT)
    chain = Rounds(toy, tree(1, 1, 2, sampled=True), WARM, BLOCK)
    assert largest_difference(chain.distribution(CONTEXT, 3), toy.distribution(CONTEXT, 3, WARM)) < EXACT


class Steady(RandomSource):
    """A deterministic source: likely events happen and the most probable index is drawn, in every batch."""

    def __init__(self, bar: float) -> None:
        super().__init__()
        self.bar = bar

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        return probability > self.bar

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities.argmax(-1)


@pytest.mark.parametrize("name", PROPOSALS)
@settings(max_examples=6)
@given(
    toy=toys((4,)),
    sampling=st.sampled_from([GREEDY, *SAMPLINGS]),
    bar=st.sampled_from([0.05, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
@example(toy=make_toy(0, 4, "close"), sampling=WARM, bar=0.05, seed=0)
def test_rows_of_a_batch_do_not_disturb_each_other(
    name: str, toy: Toy, sampling: Sampling, bar: float, seed: int
) -> None:
    config, verification, _ = PROPOSALS[name]
    contexts = [(0, 1), (2, 3), (1, 1), (3, 0), (2, 0)]
    # How full each sequence is.
    limits = torch.tensor([9, 1, 2, 0, 9])
    proposer = Rounds(toy, config, sampling, verification).proposer
    rng = RandomSource(torch.Generator().manual_seed(seed))
    batch = proposer(config, sampling, rng).propose([], toy.drafter(*contexts)).within(limits)
    logits = toy.logits(batch, *contexts)
    verdict = verify(batch, logits, sampling, verification, Steady(bar))
    for row in range(len(contexts)):
        # Padding after a row's nodes is omitted.
        count = max(1, int(batch.counts[row]))
        separate = Proposal(
            batch.tokens[[row], :count],
            batch.parents[[row], :count],
            batch.counts[[row]],
            None if batch.log_q is None else batch.log_q[[row]],
            batch.draft_ids,
        )
        own = verify(separate, logits[[row], : 1 + count], sampling, verification, Steady(bar))
        assert accepted_nodes(verdict, row) == accepted_nodes(own, 0)
        assert verdict.next_tokens[row] == own.next_tokens[0]


def accepted_nodes(verdict: Verdict, row: int) -> list[int]:
    return verdict.nodes[row, : int(verdict.counts[row])].tolist()


def test_without_proposed_tokens_verification_just_samples() -> None:
    logits = make_toy(0, 4, "random").verifier[:1, :1]
    empty = torch.empty(1, 0, dtype=torch.int64)
    proposal = Proposal(empty, empty, torch.zeros(1, dtype=torch.int64))
    expected = filtered(logits[0, 0].tolist(), WARM)
    for verification in (TOKEN, BLOCK, Verification(method="typical")):
        for log_q in (None, torch.empty(1, 1, 4).log_softmax(-1)):
            given_ = Proposal(proposal.tokens, proposal.parents, proposal.counts, log_q)
            distribution = [0.0] * 4

            def once(rng: RandomSource, given_: Any = given_, verification: Any = verification) -> Verdict:
                return verify(given_, logits, WARM, verification, rng)

            for verdict, probability in all_runs(once):
                assert verdict.counts.tolist() == [0]
                distribution[int(verdict.next_tokens)] += probability
            assert distribution == pytest.approx(expected, abs=EXACT)


def test_the_toys_sampling_agrees_with_ours() -> None:
    """Their own implementation of temperature, top-k and top-p agrees with ``Sampling``."""
    logits = make_toy(11, 5, "random").verifier
    for sampling in SAMPLINGS:
        probabilities = sampling.log_probs(logits).exp()
        for context in product(range(5), repeat=2):
            expected = filtered(logits[context].tolist(), sampling)
            assert probabilities[context].tolist() == pytest.approx(expected, abs=1e-12)
