"""What ``specforge plugins check`` finds in drafts: mistakes that change no text and stop no training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specforge.commands import plugin_check
from specforge.commands.plugin_proposals import malformed, proposing
from specforge.commands.plugin_trial import LENGTH, Trial, difference, write_verifier
from specforge.hookspecs import Algorithm
from specforge.proposals.proposal import Proposal
from specforge.registry import installed
from specforge_mlp.drafter import MLPDrafter
from specforge_mlp.model import MLPSpeculator


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    verifier = write_verifier(Path(tmp_path_factory.mktemp("check")) / "verifier")
    draft = MLPSpeculator.from_training_args(verifier.config, num_layers=3)
    draft.attach_verifier(verifier)
    text = torch.arange(LENGTH) * 37 % 1000 + 3
    return Trial(installed().find(Algorithm, "mlp"), draft.double().eval(), verifier, text)


def test_a_right_draft_has_no_fault(trial):
    for check in (plugin_check.shapes, plugin_check.trained_logits, plugin_check.drafting, plugin_check.causality):
        assert check(trial) is None
    for method in trial.algorithm.proposals:
        assert proposing(trial, method) is None


def test_a_drafter_that_takes_the_column_for_the_parent_is_found(trial, monkeypatch):
    step = MLPDrafter.step

    def by_column(self, tokens, parents):
        if int(parents[0, 0]) >= 0:
            parents = torch.arange(self._states.shape[1] - 1)[-tokens.shape[1] :].expand_as(parents)
        return step(self, tokens, parents)

    monkeypatch.setattr(MLPDrafter, "step", by_column)
    assert "after 6 tokens, draft step 2: logits are" in plugin_check.drafting(trial)


def test_a_drafter_that_reads_the_padding_of_shorter_sequences_is_found(trial, monkeypatch):
    commit = MLPDrafter.commit

    def to_the_end(self, tokens, features, counts):
        commit(self, tokens, features, torch.full_like(counts, tokens.shape[1]))

    monkeypatch.setattr(MLPDrafter, "commit", to_the_end)
    assert "sequence 1 of the batch, after 4 tokens, draft step 0: logits" in plugin_check.drafting(trial)


def test_logits_that_training_does_not_compute_are_found(trial, monkeypatch):
    def scaled(self, hidden, step=0):
        return 2 * super(MLPSpeculator, self).logits(hidden, step)

    monkeypatch.setattr(MLPSpeculator, "logits", scaled)
    assert "training does not call `logits`" in plugin_check.trained_logits(trial)
    # The drafter calls the same function.
    assert plugin_check.drafting(trial) is None


def test_tokens_that_a_draft_rules_out_are_ruled_out_on_both_sides():
    ruled_out, nothing, wrong = torch.tensor([[-torch.inf, 1.0], [0.0, 1.0], [torch.nan, 1.0]])
    assert difference(ruled_out, ruled_out) is None
    assert "inf off" in difference(nothing, ruled_out) and "inf off" in difference(ruled_out, nothing)
    assert "nan off" in difference(wrong, nothing)


@pytest.mark.parametrize(
    ("parents", "tokens", "fault"),
    [
        ([-1, -1, 0, 1], [5, 6, 5, 5], None),
        ([-1, -1, 0, 3], [5, 6, 5, 5], "nor the index of an earlier node"),
        ([-1, 0, -1, 1], [5, 6, 5, 5], "not ordered by depth"),
        ([-1, 0, 1, 2], [5, 6, 5, 5], "longer than the method's depth of 3"),
        ([-1, -1, 1, 1], [5, 6, 7, 7], "the same token"),
    ],
)
def test_what_is_wrong_with_a_tree_is_named(parents, tokens, fault):
    # Padding, here of the second sequence, may hold anything.
    tree = Proposal(torch.tensor([tokens] * 2), torch.tensor([parents, [-1, 9, 9, 9]]), torch.tensor([4, 1]))
    found = malformed(tree, 3)
    assert found is None if fault is None else fault in found
