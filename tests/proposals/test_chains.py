"""The greedy chain and the sampled one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specforge.proposals.greedy import GreedyProposer, GreedyTokenProposalConfig
from specforge.proposals.sampling import SamplingProposer, SamplingTokenProposalConfig
from specforge.sampling import RandomSource, Sampling

WARM = Sampling(temperature=1.0)
DRAFT_IDS = torch.tensor([1, 4, 5, 9])


def greedy_path(logits: Any, row: int, length: int, draft_ids: torch.Tensor | None) -> list[int]:
    path: tuple[int, ...] = ()
    for _ in range(length):
        token = int(logits(row, path).argmax())
        path += (token if draft_ids is None else int(draft_ids[token]),)
    return list(path)


@pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS], ids=["full", "pruned"])
@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["cold", "warm"])
def test_the_greedy_chain_is_the_most_probable(
    draft_ids: Any, sampling: Sampling, path_drafter: Any, random_logits: Any
) -> None:
    logits = random_logits(4)
    proposer = GreedyProposer(GreedyTokenProposalConfig(speculative_tokens=5), sampling, RandomSource())
    proposal = proposer.propose([], path_drafter(logits, batch_size=3, draft_ids=draft_ids))
    assert proposal.tokens.tolist() == [greedy_path(logits, row, 5, draft_ids) for row in range(3)]
    assert proposal.parents.tolist() == [[-1, 0, 1, 2, 3]] * 3
    assert proposal.counts.tolist() == [5] * 3
    # One token per draft forward pass; the first comes from ``commit``.
    assert proposer.depth == 5 and proposal.log_q is None
    assert (proposal.accept_k, proposal.accept_tolerance) == (1, 0.0)


def test_the_greedy_chain_carries_the_tolerance(path_drafter: Any, random_logits: Any) -> None:
    config = GreedyTokenProposalConfig(verifier_accept_k=3, accept_tolerance=0.5)
    proposal = GreedyProposer(config, WARM, RandomSource()).propose([], path_drafter(random_logits(4)))
    assert (proposal.accept_k, proposal.accept_tolerance) == (3, 0.5)


def test_the_draft_takes_no_unused_step(path_drafter: Any, random_logits: Any) -> None:
    for length in (1, 2, 5):
        drafter = path_drafter(random_logits(4))
        GreedyProposer(GreedyTokenProposalConfig(speculative_tokens=length), WARM, RandomSource()).propose([], drafter)
        assert drafter.stepped == [1] * (length - 1)


@pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS], ids=["full", "pruned"])
def test_the_sampled_chain_carries_its_distributions(draft_ids: Any, path_drafter: Any, random_logits: Any) -> None:
    logits, sampling = random_logits(4), Sampling(temperature=1.5, top_p=0.9)
    rng = RandomSource(torch.Generator().manual_seed(0))
    proposer = SamplingProposer(SamplingTokenProposalConfig(speculative_tokens=3), sampling, rng)
    proposal = proposer.propose([], path_drafter(logits, batch_size=2, draft_ids=draft_ids))
    assert proposal.parents.tolist() == [[-1, 0, 1]] * 2
    assert proposal.log_q is not None and proposal.log_q.shape == (2, 3, 4)
    for row, chain in enumerate(proposal.tokens.tolist()):
        for index, token in enumerate(chain):
            expected = sampling.log_probs(logits(row, tuple(chain[:index]))[None])[0]
            torch.testing.assert_close(proposal.log_q[row, index], expected)
            own = token if draft_ids is None else draft_ids.tolist().index(token)
            assert expected[own] > float("-inf")


def test_the_sampled_chain_has_the_drafts_distribution(path_drafter: Any) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    rng = RandomSource(torch.Generator().manual_seed(0))
    proposer = SamplingProposer(SamplingTokenProposalConfig(speculative_tokens=2), WARM, rng)
    tokens = proposer.propose([], path_drafter(lambda row, path: logits, batch_size=4000)).tokens
    for index in range(2):
        shares = tokens[:, index].bincount(minlength=3) / 4000
        torch.testing.assert_close(shares, logits.exp(), atol=0.04, rtol=0)


def test_at_temperature_0_the_sampled_chain_is_the_greedy_one(path_drafter: Any, random_logits: Any) -> None:
    logits = random_logits(4)
    proposer = SamplingProposer(SamplingTokenProposalConfig(speculative_tokens=4), Sampling(), RandomSource())
    proposal = proposer.propose([], path_drafter(logits))
    assert proposal.log_q is None
    assert proposal.tokens[0].tolist() == greedy_path(logits, 0, 4, None)
