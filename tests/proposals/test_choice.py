"""Parsing of a proposal method from text."""

from __future__ import annotations

import pytest

from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from specforge.errors import UsageError
from specforge.proposals import DynamicTreeTokenProposalConfig, GreedyTokenProposalConfig
from specforge.proposals.choice import choose_proposal, describe


@pytest.fixture
def draft():
    methods = [GreedyTokenProposalConfig(speculative_tokens=3), DynamicTreeTokenProposalConfig(depth=4)]
    speculators = SpeculatorsConfig(
        algorithm="x", proposal_methods=methods, default_proposal_method="dynamic_tree", verifier=VerifierConfig()
    )
    return SpeculatorModelConfig(speculators_model_type="x", speculators_config=speculators)


def test_none_takes_the_drafts_default(draft):
    assert choose_proposal(None, draft) == DynamicTreeTokenProposalConfig(depth=4)
    with pytest.raises(UsageError, match="no proposal method is set"):
        choose_proposal(None, None)


def test_a_name_takes_the_drafts_settings_before_the_defaults(draft):
    assert choose_proposal("greedy", draft) == GreedyTokenProposalConfig(speculative_tokens=3)
    assert choose_proposal("greedy", None) == GreedyTokenProposalConfig()


def test_settings_override_those_of_the_draft(draft):
    found = choose_proposal("dynamic_tree:expansion_factor=5,speculative_tokens=20", draft)
    assert found == DynamicTreeTokenProposalConfig(depth=4, expansion_factor=5, speculative_tokens=20)
    assert choose_proposal("static_tree:sampled=true", None).sampled is True


def test_given_settings_are_used_if_the_method_has_them():
    assert choose_proposal("bigram", None, table="a,b.safetensors").table == "a,b.safetensors"
    assert choose_proposal("greedy", None, table="unused") == GreedyTokenProposalConfig()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gready", "Did you mean 'greedy'"),
        ("greedy:tokens=3", "'tokens' is not a setting of greedy; allowed, as KEY=VALUE: speculative_tokens"),
        ("greedy:speculative_tokens", "as KEY=VALUE"),
        ("greedy:speculative_tokens=0", "greater than or equal to 1"),
        ("prompt_lookup:min_ngram=4", "min_ngram 4 exceeds max_ngram 3"),
    ],
)
def test_faults(text, reason):
    with pytest.raises(UsageError) as error:
        choose_proposal(text, None)
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["greedy", "greedy:speculative_tokens=7", "dynamic_tree:speculative_tokens=9,depth=2"])
def test_a_description_chooses_the_same_again(text):
    chosen = choose_proposal(text, None)
    assert describe(chosen) == text and choose_proposal(describe(chosen), None) == chosen
