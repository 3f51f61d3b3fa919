"""Proposal methods: how a draft proposes candidate tokens, and the settings stored with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specforge.proposals.bigram import BigramTokenProposalConfig
    from specforge.proposals.dynamic_tree import DynamicTreeTokenProposalConfig
    from specforge.proposals.greedy import GreedyTokenProposalConfig
    from specforge.proposals.prompt_lookup import PromptLookupTokenProposalConfig
    from specforge.proposals.sampling import SamplingTokenProposalConfig
    from specforge.proposals.static_tree import StaticTreeTokenProposalConfig

_MODULES = {
    "BigramTokenProposalConfig": "bigram",
    "DynamicTreeTokenProposalConfig": "dynamic_tree",
    "GreedyTokenProposalConfig": "greedy",
    "PromptLookupTokenProposalConfig": "prompt_lookup",
    "SamplingTokenProposalConfig": "sampling",
    "StaticTreeTokenProposalConfig": "static_tree",
}
__all__ = [
    "BigramTokenProposalConfig",
    "DynamicTreeTokenProposalConfig",
    "GreedyTokenProposalConfig",
    "PromptLookupTokenProposalConfig",
    "SamplingTokenProposalConfig",
    "StaticTreeTokenProposalConfig",
]


def __getattr__(name: str) -> object:
    # Imported on first use: the registry reads this package and must not load torch.
    if name in _MODULES:
        return getattr(importlib.import_module(f"specforge.proposals.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'specforge.proposals' has no attribute {name!r}")
