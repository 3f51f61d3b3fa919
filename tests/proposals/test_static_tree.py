from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.proposals.proposal import Proposal
from specforge.proposals.static_tree import StaticTreeProposer, StaticTreeTokenProposalConfig
from specforge.sampling import RandomSource, Sampling

WARM = Sampling(temperature=1.0)


def propose(drafter: Any, sampling: Sampling = WARM, seed: int = 0, **config: Any) -> Proposal:
    rng = RandomSource(torch.Generator().manual_seed(seed))
    return StaticTreeProposer(StaticTreeTokenProposalConfig(**config), sampling, rng).propose([], drafter)


def paths_of(proposal: Proposal, row: int) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.tokens[row].tolist(), proposal.parents[row].tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@settings(max_examples=20)
@given(
    first=st.integers(1, 5),
    others=st.integers(1, 3),
    depth=st.integers(1, 4),
    size=st.integers(1, 6),
    sampled=st.booleans(),
)
def test_all_nodes_of_a_level_have_the_same_number_of_children(
    first: int, others: int, depth: int, size: int, sampled: bool, path_drafter: Any, random_logits: Any
) -> None:
    drafter = path_drafter(random_logits(size), batch_size=2)
    proposal = propose(drafter, initial_branching_factor=first, branching_factor=others, depth=depth, sampled=sampled)
    # The vocabulary may be smaller than the tree's width.
    widths = [min(first, size)] + [min(others, size)] * (depth - 1)
    levels, number = [], 1
    for width in widths:
        number *= width
        levels.append(number)
    assert proposal.counts.tolist() == [sum(levels)] * 2
    assert drafter.stepped == levels[:-1]
    for row in range(2):
        depths = proposal.depths[row].tolist()
        assert depths == [level for level, nodes in enumerate(levels, start=1) for _ in range(nodes)]
        paths = paths_of(proposal, row)
        assert len(set(paths)) == len(paths)
        children = [proposal.parents[row].tolist().count(node) for node in range(-1, len(paths))]
        inner = sum(levels[:-1])
        assert children[0] == widths[0] and children[inner + 1 :] == [0] * (len(paths) - inner)
        assert all(count == widths[depths[node]] for node, count in enumerate(children[1 : inner + 1]))
    if sampled:
        assert proposal.log_q is not None and proposal.log_q.shape == (2, 1 + sum(levels[:-1]), size)
    else:
        assert proposal.log_q is None


def test_the_most_probable_tokens_are_taken_best_first(path_drafter: Any, random_logits: Any) -> None:
    logits = random_logits(6)
    proposal = propose(path_drafter(logits), initial_branching_factor=3, branching_factor=2, depth=3)
    paths = paths_of(proposal, 0)
    for node, path in enumerate(paths):
        siblings = [
            other[-1]
            for other, parent in zip(paths, proposal.parents[0].tolist(), strict=True)
            if parent == proposal.parents[0, node]
        ]
        ranking = logits(0, path[:-1]).argsort(descending=True).tolist()
        assert siblings == ranking[: len(siblings)]


def test_sampled_tokens_carry_their_distributions(path_drafter: Any, random_logits: Any) -> None:
    logits, draft_ids = random_logits(5), torch.tensor([2, 3, 7, 11, 12])
    sampling = Sampling(temperature=0.7, top_k=3)
    drafter = path_drafter(logits, draft_ids=draft_ids)
    proposal = propose(drafter, sampling, initial_branching_factor=2, branching_factor=2, depth=3, sampled=True)
    assert proposal.log_q is not None and torch.equal(proposal.draft_ids, draft_ids)
    paths = [(), *paths_of(proposal, 0)]
    for node in range(proposal.log_q.shape[1]):
        torch.testing.assert_close(proposal.log_q[0, node], sampling.log_probs(logits(0, paths[node])[None])[0])
    # Two of the three possible tokens, never the same one twice, and not always the best.
    assert {path[0] for path in paths[1:]} <= set(draft_ids[logits(0, ()).topk(3).indices].tolist())
    several = {
        tuple(
            propose(path_drafter(logits), WARM, seed, initial_branching_factor=2, depth=1, sampled=True)
            .tokens[0]
            .tolist()
        )
        for seed in range(30)
    }
    assert len(several) > 3 and all(first != other for first, other in several)


def test_nothing_is_drawn_at_temperature_0(path_drafter: Any, random_logits: Any) -> None:
    drawn = propose(path_drafter(random_logits(5)), Sampling(), sampled=True)
    fixed = propose(path_drafter(random_logits(5)), Sampling(), sampled=False)
    assert drawn.log_q is None
    assert torch.equal(drawn.tokens, fixed.tokens)


def test_its_depth_comes_from_the_settings() -> None:
    proposer = StaticTreeProposer(StaticTreeTokenProposalConfig(depth=3), WARM, RandomSource())
    assert proposer.depth == 3
    for wrong in ("initial_branching_factor", "branching_factor", "depth"):
        with pytest.raises(ValueError, match=wrong):
            StaticTreeTokenProposalConfig(**{wrong: 0})
