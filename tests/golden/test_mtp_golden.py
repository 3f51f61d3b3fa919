"""Parity of multi-token-prediction heads with recorded runs: as engines draft with them, token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from specforge.documents import DocumentLayout
from specforge.models.chain.alignment import align
from specforge.models.chain.ttt_attention import TrainingTimeTest
from specforge.models.draft_rows import DraftRows
from specforge.models.speculator import SpeculatorModel
from specforge.sampling import Sampling
from specforge.training.losses.comparison import Term
from specforge.training.losses.distillation import Labels, Teacher, distill
from specforge.training.losses.named import objective_terms
from specforge.verifier.features import Features, capture
from specforge.verifier.loading import VerifierLoading, load_verifier
from specforge_mtp.model import MtpDraftModel
from specforge_mtp.native import read_head


class HeadCase:
    """One recorded head, and the text that it was run on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        self.inputs, self.expected = (load_file(folder / f"{one}.safetensors") for one in ("inputs", "expected"))
        self.verifier = str(folder / "verifier")
        self.steps = int(self.facts["settings"]["num_speculative_steps"])

    def __str__(self) -> str:
        return self.folder.name

    @property
    def tolerance(self) -> dict[str, float]:
        return {name: self.facts["tolerance"][name] for name in ("atol", "rtol")}

    @cached_property
    def draft(self) -> Any:
        draft = SpeculatorModel.from_pretrained(self.folder / "draft")
        draft.attach_verifier(self.verifier, "train_only")
        return draft

    @property
    def tokens(self) -> Tensor:
        return self.inputs["token_ids"]

    @cached_property
    def features(self) -> Features:
        last = self.inputs["verifier_last_hidden_states"][None]
        return Features(last[:, :, None, :][:, :, :0], last)

    def states(self) -> Tensor:
        """States of every step at every row, [S, T, H]."""
        positions = torch.arange(len(self.tokens))[None]
        with torch.no_grad():
            return self.draft.unroll(
                self.tokens[None], self.features, positions, torch.zeros_like(positions), self.steps
            )[:, 0]

    def recorded(self, step: int) -> tuple[Tensor, Tensor]:
        """The rows that were recorded at a step, and their logits."""
        rows = self.expected[f"chain_rows_step{step}"].nonzero().squeeze(1)
        return rows, self.expected[f"chain_logits_step{step}"][rows]

    def off(self) -> float:
        """Return the largest difference of logits, in tolerances."""
        worst = 0.0
        for step, states in enumerate(self.states()):
            rows, expected = self.recorded(step)
            allowed = self.tolerance["atol"] + self.tolerance["rtol"] * expected.abs()
            worst = max(worst, float(((self.draft.logits(states[rows]) - expected).abs() / allowed).max()))
        return worst


CASES = [HeadCase(folder) for folder in golden_cases.CASES if folder.name.startswith("mtp")]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> HeadCase:
    return request.param


def test_logits_of_every_step(case: HeadCase) -> None:
    assert case.off() <= 1


def test_the_head_is_read_from_the_verifiers_own_files(case: HeadCase) -> None:
    found = read_head(case.draft.config, case.verifier, VerifierLoading())
    own = case.draft.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())


def test_the_state_that_is_read_comes_after_the_final_norm(case: HeadCase) -> None:
    verifier = load_verifier(case.verifier)
    features = capture(verifier, case.tokens[None], torch.arange(len(case.tokens))[None], [])
    read = case.draft.first_feature(features)[0]
    torch.testing.assert_close(read, case.inputs["verifier_final_hidden_states"], **case.tolerance)


def compared(case: HeadCase, objective: dict[str, float], supervised: Tensor) -> Tensor:
    """Return each step's sum of a loss over some rows, [S]; all steps weigh 1."""
    documents = DocumentLayout.of(torch.zeros(1, len(case.tokens), dtype=torch.int64))
    rows = DraftRows.needed(supervised, documents)
    batch = {"input_ids": case.tokens[None], "position_ids": torch.arange(len(case.tokens))[None]}
    targets = align(torch.ones(1, len(case.tokens), dtype=torch.bool), torch.zeros_like(batch["input_ids"]), case.steps)
    terms: list[Term] = objective_terms(objective)
    outcome = distill(
        case.draft.states(batch, case.features, rows),
        case.draft.head_weights,
        Teacher(case.features.last[0], case.draft.verifier_parts, None),
        targets.targets.flatten(1),
        supervised,
        terms,
        torch.ones(supervised.shape),
        labels=Labels(case.tokens.roll(-1), Sampling()),
        state_index=rows.state_index(),
    )
    outcome.loss.backward()
    assert all(one.grad is not None for one in case.draft.parameters())
    return outcome.terms[terms[0].name].detach()


def test_losses_of_the_text_and_of_the_verifiers_distribution(case: HeadCase) -> None:
    """The reference computes the text's loss over rows 0 .. L - 2 - steps; the first step is the same in both."""
    length, steps = len(case.tokens), case.steps
    supervised = torch.zeros(steps, length, dtype=torch.bool)
    for step in range(steps):
        run = torch.arange(length - 1 - steps)
        supervised[step, run] = case.inputs["token_loss_mask"][run + 2 + step]
    hard, soft = (compared(case, {name: 1.0}, supervised) for name in ("text", "kl"))
    first = case.facts["settings"]["step_weights"][0] * hard[0] / supervised[0].sum()
    torch.testing.assert_close(first, case.expected["loss_step0"], **case.tolerance)
    for step in range(steps):
        rows = supervised[step].nonzero().squeeze(1)
        log_q = case.expected[f"chain_logits_step{step}"][rows].log_softmax(-1)
        log_p = case.expected["target_logits"][rows + 1 + step].log_softmax(-1)
        text = F.nll_loss(log_q, case.tokens[rows + 2 + step], reduction="sum")
        torch.testing.assert_close(hard[step], text, **case.tolerance)
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        torch.testing.assert_close(soft[step], divergence, **case.tolerance)


@torch.no_grad()
def test_drafting_computes_the_same(case: HeadCase) -> None:
    drafter, begin = case.draft.drafter(1), 0
    for anchor in (3, 4, 7, 9):
        new = slice(begin, anchor + 1)
        features = Features(case.features.aux[:, new], case.features.last[:, new])
        drafter.commit(case.tokens[None, begin + 1 : anchor + 2], features, torch.tensor([anchor + 1 - begin]))
        begin = anchor + 1
        logits = [drafter.root[0]]
        for step in range(1, case.steps):
            token = case.tokens[None, anchor + 1 + step : anchor + 2 + step]
            logits.append(drafter.step(token, torch.tensor([[step - 2]]))[0, 0])
        for step, found in enumerate(logits):
            expected = case.expected[f"chain_logits_step{step}"][anchor]
            torch.testing.assert_close(found, expected, **case.tolerance)


def test_a_head_is_written_as_it_was_read(case: HeadCase, tmp_path: Path) -> None:
    case.draft.save_pretrained(tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, case.folder / "draft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    config, read = (json.loads((one / "config.json").read_text()) for one in (tmp_path, case.folder / "draft"))
    layers, known = config["transformer_layer_config"], read["transformer_layer_config"]
    assert {name: layers[name] for name in known if name in layers} == {
        name: one for name, one in known.items() if name in layers
    }
    assert config["num_nextn_predict_layers"] == read["num_nextn_predict_layers"]


def state_before_the_norm(patch: pytest.MonkeyPatch, draft: MtpDraftModel) -> None:
    patch.setattr(draft, "first_feature", lambda features: features.last)


def state_first(patch: pytest.MonkeyPatch, draft: MtpDraftModel) -> None:
    patch.setattr(draft, "family", replace(draft.family, hidden_first=True))


def without_own_keys(patch: pytest.MonkeyPatch, draft: MtpDraftModel) -> None:
    right = TrainingTimeTest.record_step
    patch.setattr(TrainingTimeTest, "record_step", lambda *given: (right(*given)[0], []))


def same_position(patch: pytest.MonkeyPatch, draft: MtpDraftModel) -> None:
    """As published trainers do: all steps at the position of their row."""
    right, calls = draft.advance, []

    def advance(tokens: Tensor, feature: Tensor, position_ids: Tensor, *others: Any) -> Tensor:
        calls.append(0)
        return right(tokens, feature, position_ids - len(calls) + 1, *others)

    patch.setattr(draft, "advance", advance)


def not_normalised_between_steps(patch: pytest.MonkeyPatch, draft: MtpDraftModel) -> None:
    patch.setattr(draft, "fed_back", lambda states: states / draft.mtp_layers[0].final_layernorm.weight)


@pytest.mark.parametrize(
    "mutate", [state_before_the_norm, state_first, without_own_keys, same_position, not_normalised_between_steps]
)
def test_mutations_are_seen(mutate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = HeadCase(CASES[0].folder)
    mutate(monkeypatch, case.draft)
    assert case.off() > 100
