"""The published tree against all paths, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from specforge.hookspecs import ProposalMethod
from specforge.models.drafter import Drafter
from specforge.proposals.choice import choose_proposal, describe
from specforge.proposals.proposal import Proposal
from specforge.registry import installed
from specforge.sampling import RandomSource, Sampling
from specforge.verifier.features import Features
from specforge_mlp.candidate_tree import CandidateTreeProposer, CandidateTreeTokenProposalConfig

Path = tuple[int, ...]


class RandomDrafter(Drafter):
    """Its logits are a function of a row and a node's path of the verifier's tokens."""

    def __init__(self, seed: int, batch: int, vocabulary: int, draft_ids: Tensor | None = None) -> None:
        self.seed, self.vocabulary = seed, vocabulary
        self.draft_ids = draft_ids
        self.paths: list[list[Path]] = [[()] for _ in range(batch)]
        self.root = torch.stack([self.logits_after(row, ()) for row in range(batch)])
        self.calls = 0

    def logits_after(self, row: int, path: Path) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, row, path)) % 2**31)
        return 2 * torch.randn(self.vocabulary, generator=generator)

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        raise AssertionError("a toy drafts for one round")

    def select(self, rows: Tensor) -> None:
        raise AssertionError("a toy drafts for one round")

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        self.calls += 1
        logits = []
        for row, (own, own_parents) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
            new = [(*self.paths[row][parent + 1], token) for token, parent in zip(own, own_parents, strict=True)]
            self.paths[row] += new
            logits.append(torch.stack([self.logits_after(row, path) for path in new]))
        return torch.stack(logits)


def propose(drafter: Drafter, widths: Sequence[int], candidates: int) -> Proposal:
    config = CandidateTreeTokenProposalConfig(top_k_tokens_per_head=list(widths), n_candidates=candidates)
    return CandidateTreeProposer(config, Sampling(), RandomSource()).propose([torch.tensor([1])], drafter)


def paths_of(proposal: Proposal, row: int) -> list[Path]:
    """The path of each real node of a row; parents must come before children."""
    paths: list[Path] = []
    for node in range(int(proposal.counts[row])):
        parent = int(proposal.parents[row, node])
        assert -1 <= parent < node
        paths.append((*(paths[parent] if parent >= 0 else ()), int(proposal.tokens[row, node])))
    return paths


def best_paths(drafter: RandomDrafter, row: int, widths: Sequence[int], candidates: int) -> set[Path]:
    """All nodes on the most probable paths that choose one of the best few tokens after each node."""
    ids = list(range(drafter.vocabulary)) if drafter.draft_ids is None else drafter.draft_ids.tolist()
    scored: list[tuple[float, Path]] = []
    for ranks in product(*(range(min(width, drafter.vocabulary)) for width in widths)):
        path: Path = ()
        score = 0.0
        for rank in ranks:
            logits = drafter.logits_after(row, path).tolist()
            normaliser = math.log(sum(math.exp(logit) for logit in logits))
            token = sorted(range(len(logits)), key=lambda token: -logits[token])[rank]
            score += logits[token] - normaliser
            path = (*path, ids[token])
        scored.append((score, path))
    scored.sort(reverse=True)
    return {path[:length] for _, path in scored[:candidates] for length in range(1, len(widths) + 1)}


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    candidates=st.integers(1, 40),
    vocabulary=st.integers(3, 8),
    pruned=st.booleans(),
)
def test_the_most_probable_paths_are_proposed(
    seed: int, widths: list[int], candidates: int, vocabulary: int, pruned: bool
) -> None:
    draft_ids = torch.arange(vocabulary) * 3 + 2 if pruned else None
    drafter = RandomDrafter(seed, 2, vocabulary, draft_ids)
    proposal = propose(drafter, widths, candidates)
    assert proposal.tokens.shape == proposal.parents.shape == (2, int(proposal.counts.max()))
    assert drafter.calls == len(widths) - 1
    for row in range(2):
        paths = paths_of(proposal, row)
        assert len(set(paths)) == len(paths)
        assert set(paths) == best_paths(drafter, row, widths, candidates)
        depths = [len(path) for path in paths]
        assert depths == sorted(depths)
        assert proposal.depths[row, : len(paths)].tolist() == depths


def test_each_row_has_its_own_tree() -> None:
    proposal = propose(RandomDrafter(5, 4, 9), [5, 4, 3], 5)
    trees = [frozenset(paths_of(proposal, row)) for row in range(4)]
    assert len(set(trees)) == 4 and len(set(proposal.counts.tolist())) > 1


def test_siblings_are_ordered_by_probability() -> None:
    drafter = RandomDrafter(1, 1, 9)
    proposal = propose(drafter, [4], 4)
    assert proposal.tokens[0].tolist() == drafter.root[0].topk(4).indices.tolist()


def test_nothing_is_drawn() -> None:
    assert propose(RandomDrafter(1, 1, 9), [5, 4, 3], 5).log_q is None


def test_defaults_are_the_published_ones() -> None:
    config = CandidateTreeTokenProposalConfig()
    assert (config.top_k_tokens_per_head, config.n_candidates) == ([5, 4, 3], 5)
    assert CandidateTreeProposer(config, Sampling(), RandomSource()).depth == 3


@pytest.mark.parametrize(
    "values",
    [
        {"top_k_tokens_per_head": []},
        {"top_k_tokens_per_head": [3, 0]},
        {"n_candidates": 0},
        {"proposal_type": "greedy"},
    ],
    ids=str,
)
def test_settings_out_of_bounds_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        CandidateTreeTokenProposalConfig.model_validate(values)


def test_the_method_is_registered() -> None:
    method = installed().find(ProposalMethod, "candidate_tree")
    assert installed().load(method, "config") is CandidateTreeTokenProposalConfig
    assert installed().load(method, "proposer") is CandidateTreeProposer


def test_settings_can_be_given_as_text() -> None:
    config = CandidateTreeTokenProposalConfig(top_k_tokens_per_head=[3, 2], n_candidates=4)
    assert choose_proposal("candidate_tree:top_k_tokens_per_head=[3,2],n_candidates=4", None) == config
    assert choose_proposal(describe(config), None) == config
