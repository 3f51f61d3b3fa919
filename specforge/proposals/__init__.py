"""Proposal methods: how a draft turns into candidate tokens, and the configurations that are stored with it."""

from specforge.proposals.bigram import BigramTokenProposalConfig
from specforge.proposals.dynamic_tree import DynamicTreeTokenProposalConfig
from specforge.proposals.greedy import GreedyTokenProposalConfig
from specforge.proposals.prompt_lookup import PromptLookupTokenProposalConfig
from specforge.proposals.sampling import SamplingTokenProposalConfig
from specforge.proposals.static_tree import StaticTreeTokenProposalConfig

__all__ = [
    "BigramTokenProposalConfig",
    "DynamicTreeTokenProposalConfig",
    "GreedyTokenProposalConfig",
    "PromptLookupTokenProposalConfig",
    "SamplingTokenProposalConfig",
    "StaticTreeTokenProposalConfig",
]
