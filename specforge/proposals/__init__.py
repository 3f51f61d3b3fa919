"""Proposal methods: how a draft turns into candidate tokens, and the configurations that are stored with it."""

from specforge.proposals.greedy import GreedyTokenProposalConfig

__all__ = ["GreedyTokenProposalConfig"]
