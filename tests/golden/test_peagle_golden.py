"""Parity of P-EAGLE with recorded runs of speculators: every depth at every row, the sampled loss, and drafting."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import golden_cases
import pytest
import torch
from test_golden import Case
from torch import Tensor

from specforge.documents import DocumentLayout
from specforge.models.draft_rows import DraftRows
from specforge.models.speculator import SpeculatorModel
from specforge.training.losses.comparison import Term
from specforge.training.losses.distillation import Teacher, distill
from specforge.training.losses.objectives import forward_kl
from specforge.verifier.features import Features, capture
from specforge.verifier.loading import load_verifier


class DepthsCase(Case):
    @property
    def depths(self) -> int:
        return int(self.facts["settings"]["num_depths"])

    @cached_property
    def draft(self) -> Any:
        draft = SpeculatorModel.from_pretrained(self.folder / "draft")
        draft.attach_verifier(str(self.folder / "verifier"), "train_only")
        return draft

    @cached_property
    def features(self) -> Features:
        return Features(self.states[:, :, :-1], self.states[:, :, -1])

    def unrolled(self) -> Tensor:
        batch = self.batch
        with torch.no_grad():
            states = self.draft.unroll(
                batch["tokens"], self.features, batch["positions"], batch["documents"], self.depths
            )
        return states[:, 0, self.rows]

    def compared(self, depth: int) -> Tensor:
        return self.expected[f"rows_depth{depth}"][: self.rows.numel()]


CASES = [DepthsCase(folder) for folder in golden_cases.CASES if folder.name.startswith("peagle")]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> DepthsCase:
    return request.param


def error(case: DepthsCase) -> float:
    """Return the largest difference of logits, in tolerances."""
    worst = 0.0
    for depth, states in enumerate(case.unrolled()):
        rows = case.compared(depth)
        expected = case.expected[f"logits_depth{depth}"][: rows.numel()][rows]
        allowed = case.tolerance["atol"] + case.tolerance["rtol"] * expected.abs()
        worst = max(worst, float(((case.draft.logits(states)[rows] - expected).abs() / allowed).max()))
    return worst


def test_logits_of_every_depth(case: DepthsCase) -> None:
    assert error(case) <= 1


def test_the_loss_of_the_sampled_pairs(case: DepthsCase) -> None:
    tokens, count = case.batch["tokens"], case.rows.numel()
    run, supervised = (torch.zeros(case.depths, tokens.shape[1], dtype=torch.bool) for _ in range(2))
    for anchor, depth in zip(case.inputs["cod_anchor"].tolist(), case.inputs["cod_depth"].tolist(), strict=True):
        if anchor < count:
            run[depth, case.rows[anchor]] = True
            supervised[depth, case.rows[anchor]] = case.inputs["loss_mask"][anchor + depth]
    rows = DraftRows.needed(run, DocumentLayout.of(case.batch["documents"]))
    batch = {"input_ids": tokens, "position_ids": case.batch["positions"]}
    states = case.draft.states(batch, case.features, rows)
    offset = 1 + torch.arange(case.depths)[:, None] + torch.arange(tokens.shape[1])
    weights = torch.full(supervised.shape, 1 / (float(supervised.sum()) + 1e-5))
    outcome = distill(
        states,
        case.draft.lm_head.weight,
        Teacher(case.features.last.flatten(0, 1), case.draft.verifier_parts, case.draft.draft_ids),
        offset.clamp(max=tokens.shape[1] - 1),
        supervised,
        [Term("kl", 1.0, forward_kl)],
        weights,
        state_index=rows.state_index(),
    )
    torch.testing.assert_close(outcome.loss, case.expected["loss_cod"], **case.tolerance)
    outcome.loss.backward()
    assert case.draft.mask_hidden.grad.abs().max() > 0
    assert case.draft.embed_tokens.weight.grad[case.draft.config.mask_token_id].abs().max() > 0


@torch.no_grad()
def test_drafting_computes_the_same(case: DepthsCase) -> None:
    tokens = case.documents[0].tokens
    verifier = load_verifier(str(case.folder / "verifier"))
    features = capture(verifier, tokens[None], torch.arange(len(tokens))[None], case.draft.aux_layers)
    drafter = case.draft.drafter(1)
    begin = 0
    for anchor in (3, 4, 6, 7):
        new = Features(features.aux[:, begin : anchor + 1], features.last[:, begin : anchor + 1])
        drafter.commit(tokens[None, begin + 1 : anchor + 2], new, torch.tensor([anchor + 1 - begin]))
        begin = anchor + 1
        logits, parent = [drafter.root[0]], -1
        for _ in range(1, case.depths):
            logits.append(drafter.step(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[parent]]))[0, 0])
            parent += 1
        for depth, found in enumerate(logits):
            if case.compared(depth)[anchor]:
                torch.testing.assert_close(found, case.expected[f"logits_depth{depth}"][anchor], **case.tolerance)


def later_position(patch: pytest.MonkeyPatch, case: DepthsCase) -> None:
    right = case.draft.run
    shifted = lambda tokens, feature, positions, *others: right(  # noqa: E731
        tokens, feature, positions + (tokens == case.draft.config.mask_token_id), *others
    )
    patch.setattr(case.draft, "run", shifted)


def other_mask(patch: pytest.MonkeyPatch, case: DepthsCase) -> None:
    patch.setattr(case.draft.config, "mask_token_id", case.draft.config.mask_token_id - 1)


def raw_mask(patch: pytest.MonkeyPatch, case: DepthsCase) -> None:
    patch.setattr(case.draft, "mask_feature", lambda: torch.zeros(1, 1, case.draft.fc.out_features))


@pytest.mark.parametrize("mutate", [later_position, other_mask, raw_mask])
def test_mutations_are_detected(mutate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = DepthsCase(CASES[0].folder)
    mutate(monkeypatch, case)
    assert error(case) > 100


def test_a_draft_is_written_as_it_was_read(case: DepthsCase, tmp_path: Any) -> None:
    case.draft.save_pretrained(tmp_path)
    again = SpeculatorModel.from_pretrained(tmp_path)
    assert again.config.mask_token_id == case.facts["settings"]["mask_token_id"]
    assert again.config.num_depths == case.depths
    for name, tensor in SpeculatorModel.from_pretrained(case.folder / "draft").state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
