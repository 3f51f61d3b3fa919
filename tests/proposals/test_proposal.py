from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.proposals.proposal import Proposal, follow


@st.composite
def proposals(draw: st.DrawFn) -> Proposal:
    """Trees of any shape ordered by depth; padding comes after the nodes."""
    rows, size = draw(st.integers(1, 3)), draw(st.integers(0, 8))
    parents, counts = [], []
    for _ in range(rows):
        own = [draw(st.integers(-1, node - 1)) for node in range(size)]
        depths: list[int] = []
        for parent in own:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        order = sorted(range(size), key=lambda node: depths[node])
        index = {-1: -1, **{node: number for number, node in enumerate(order)}}
        parents.append([index[own[node]] for node in order])
        counts.append(draw(st.integers(0, size)))
    shape = (rows, size)
    return Proposal(
        torch.arange(rows * size).view(shape),
        torch.tensor(parents, dtype=torch.int64).view(shape),
        torch.tensor(counts),
    )


def depths_of(parents: list[int]) -> list[int]:
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


@given(proposal=proposals())
def test_depths_are_those_of_the_parents(proposal: Proposal) -> None:
    for row, parents in enumerate(proposal.parents.tolist()):
        assert proposal.depths[row].tolist() == depths_of(parents)


@given(proposal=proposals(), data=st.data())
def test_nodes_beyond_a_limit_are_left_out(proposal: Proposal, data: st.DataObject) -> None:
    limits = [data.draw(st.integers(0, 9)) for _ in range(len(proposal.tokens))]
    within = proposal.within(torch.tensor(limits))
    for row, limit in enumerate(limits):
        own = list(zip(proposal.tokens[row].tolist(), proposal.parents[row].tolist(), strict=True))
        depths = depths_of([parent for _, parent in own])
        expected = [
            node for node, depth in zip(own[: int(proposal.counts[row])], depths, strict=False) if depth <= limit
        ]
        count = int(within.counts[row])
        left = list(zip(within.tokens[row, :count].tolist(), within.parents[row, :count].tolist(), strict=True))
        assert left == expected
    # No wider than the widest row.
    assert within.tokens.shape == within.parents.shape == (len(limits), int(within.counts.max()))


def test_other_fields_of_a_proposal_are_kept() -> None:
    log_q, draft_ids = torch.zeros(1, 3, 5), torch.arange(5)
    tokens, parents = torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 0, 1]])
    proposal = Proposal(tokens, parents, torch.tensor([3]), log_q, draft_ids, accept_k=2, accept_tolerance=0.5)
    within = proposal.within(torch.tensor([2]))
    assert within.tokens.tolist() == [[1, 2]]
    assert within.log_q is log_q and within.draft_ids is draft_ids
    assert (within.accept_k, within.accept_tolerance) == (2, 0.5)


def test_chains_by_a_rule_may_be_of_any_length() -> None:
    sequences = [torch.tensor([5, 1]), torch.tensor([7]), torch.tensor([2, 3, 4])]
    proposal = follow(sequences, lambda tokens: tokens[1:])
    assert proposal.counts.tolist() == [1, 0, 2]
    assert proposal.tokens.tolist() == [[1, 0], [0, 0], [3, 4]]
    assert proposal.parents.tolist() == [[-1, 0]] * 3
    assert proposal.tokens.dtype == proposal.parents.dtype == proposal.counts.dtype == torch.int64
    assert proposal.log_q is None
    nothing = follow(sequences, lambda tokens: tokens[:0])
    assert nothing.tokens.shape == nothing.parents.shape == (3, 0)
