from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specforge.proposals.dynamic_tree import DynamicTreeProposer, DynamicTreeTokenProposalConfig
from specforge.proposals.proposal import Proposal
from specforge.sampling import RandomSource, Sampling

Path = tuple[int, ...]


def propose(drafter: Any, **config: int) -> Proposal:
    settings_ = DynamicTreeTokenProposalConfig(**config)
    return DynamicTreeProposer(settings_, Sampling(), RandomSource()).propose([], drafter)


def paths_of(proposal: Proposal, row: int = 0) -> list[Path]:
    """The path of tokens to each node, in the order of the nodes."""
    paths: list[Path] = []
    for token, parent in zip(proposal.tokens[row].tolist(), proposal.parents[row].tolist(), strict=True):
        assert parent < len(paths), "a parent comes before its children"
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def dynamic_tree(
    log_probs: Callable[[Path], dict[int, float]], speculative_tokens: int, expansion_factor: int, depth: int
) -> list[Path]:
    """The definition, on paths: the best of all recorded nodes, best first."""
    recorded: dict[Path, float] = {}
    frontier: dict[Path, float] = {(): 0.0}
    for _ in range(depth):
        new: dict[Path, float] = {}
        for path, score in frontier.items():
            children = sorted(log_probs(path).items(), key=lambda item: -item[1])
            for token, value in children[:expansion_factor]:
                new[(*path, token)] = score + value
        recorded |= new
        best = sorted(new.items(), key=lambda item: -item[1])
        # The first level has one node per child of the root; later frontiers have the same width.
        frontier = dict(best[: min(expansion_factor, len(log_probs(())))])
    ranking = sorted(recorded, key=lambda path: -recorded[path])
    return ranking[:speculative_tokens]


def by_token(logits: Tensor, draft_ids: Tensor | None) -> dict[int, float]:
    values = logits.float().log_softmax(-1).tolist()
    ids = range(len(values)) if draft_ids is None else draft_ids.tolist()
    return dict(zip(ids, values, strict=True))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 6),
    pruned=st.booleans(),
    sharpness=st.sampled_from([0.5, 2.0, 8.0]),
    tokens=st.integers(1, 30),
    expansion=st.integers(1, 7),
    depth=st.integers(1, 4),
)
@example(seed=1, size=6, pruned=True, sharpness=2.0, tokens=30, expansion=4, depth=4)
@example(seed=2, size=6, pruned=False, sharpness=0.5, tokens=59, expansion=6, depth=5)
def test_it_is_the_tree_of_the_definition(
    seed: int,
    size: int,
    pruned: bool,
    sharpness: float,
    tokens: int,
    expansion: int,
    depth: int,
    path_drafter: Any,
    random_logits: Any,
) -> None:
    logits = random_logits(size, seed, sharpness)
    draft_ids = torch.arange(size) * 3 + 1 if pruned else None
    drafter = path_drafter(logits, batch_size=2, draft_ids=draft_ids)
    proposal = propose(drafter, speculative_tokens=tokens, expansion_factor=expansion, depth=depth)
    assert proposal.log_q is None
    for row in range(2):

        def log_probs(path: Path, row: int = row) -> dict[int, float]:
            return by_token(logits(row, path), draft_ids)

        expected = dynamic_tree(log_probs, tokens, expansion, depth)
        paths = paths_of(proposal, row)
        assert len(set(paths)) == len(paths) == int(proposal.counts[row])
        assert set(paths) == set(expected)
        assert [len(path) for path in paths] == sorted(len(path) for path in paths)
        assert proposal.depths[row].tolist() == [len(path) for path in paths]
    # The draft takes one step for each level after the first.
    assert drafter.stepped == [min(expansion, size)] * (depth - 1)


def test_a_child_of_probability_1_comes_after_its_parent(path_drafter: Any) -> None:
    """It has exactly its parent's score; breaking the tie must not separate them."""
    certain = torch.tensor([-100.0, 100.0, -100.0, -100.0])

    def logits(row: int, path: Path) -> Tensor:
        return torch.tensor([0.2, 0.1, 0.0, -0.1]) if not path else certain

    for tokens in range(1, 12):
        proposal = propose(path_drafter(logits), speculative_tokens=tokens, expansion_factor=3, depth=5)
        paths = paths_of(proposal)
        assert all(path[:-1] in paths for path in paths if len(path) > 1)
        # The certain continuation of the best first token has the same probability.
        assert (0, *[1] * (min(tokens, 5) - 1)) in paths


def test_impossible_tokens_come_last(path_drafter: Any) -> None:
    never = float("-inf")

    def logits(row: int, path: Path) -> Tensor:
        return torch.tensor([1.0, 0.0, never])

    paths = paths_of(propose(path_drafter(logits), speculative_tokens=6, expansion_factor=3, depth=2))
    assert set(paths) == {(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)}
    # A tree full of impossible tokens is still a tree.
    everything = paths_of(propose(path_drafter(logits), speculative_tokens=99, expansion_factor=3, depth=3))
    assert all(path[:-1] in everything for path in everything if len(path) > 1)


def test_a_uniform_draft_still_gives_a_tree(path_drafter: Any) -> None:
    for tokens in (1, 5, 30):
        drafter = path_drafter(lambda row, path: torch.zeros(7))
        paths = paths_of(propose(drafter, speculative_tokens=tokens, expansion_factor=3, depth=4))
        assert len(set(paths)) == len(paths) == tokens
        assert all(path[:-1] in paths for path in paths if len(path) > 1)


def test_the_tree_is_deeper_if_the_draft_is_confident(path_drafter: Any) -> None:
    sure, unsure = torch.tensor([5.0, 0.0, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.0, 0.0])

    def logits(row: int, path: Path) -> Tensor:
        return sure if row == 0 else unsure

    drafter = path_drafter(logits, batch_size=2)
    depths = propose(drafter, speculative_tokens=6, expansion_factor=4, depth=6).depths.max(1).values
    assert depths[0] >= 5 and depths[1] <= 2


def test_the_published_size_is_the_default(path_drafter: Any, random_logits: Any) -> None:
    proposer = DynamicTreeProposer(DynamicTreeTokenProposalConfig(), Sampling(), RandomSource())
    assert proposer.depth == proposer.config.depth == 6
    proposal = proposer.propose([], path_drafter(random_logits(50)))
    assert proposal.tokens.shape == (1, 59)
    assert int(proposal.depths.max()) <= 6


@pytest.mark.parametrize("wrong", ["speculative_tokens", "expansion_factor", "depth"])
def test_sizes_are_positive(wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        DynamicTreeTokenProposalConfig(**{wrong: 0})
