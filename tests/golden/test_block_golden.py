"""Parity of block drafters with recorded runs: speculators' training views, z-lab's and DeepSpec's decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import ROOT
from safetensors.torch import load_file
from torch import Tensor

from specforge.decoding.loop import Decoder
from specforge.documents import DocumentLayout
from specforge.models.block.attention import PackedBlocks
from specforge.models.chain.alignment import align
from specforge.models.draft_rows import DraftRows
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig
from specforge.training.losses.comparison import Term
from specforge.training.losses.distillation import DraftSteps, Teacher, distill
from specforge.training.losses.objectives import Distributions, argmax_cross_entropy, forward_kl, total_variation
from specforge.training.losses.weightings import ChainWeighting, dpace
from specforge.training.module import Drafted
from specforge.verifier.features import Features, capture
from specforge.verifier.loading import load_verifier
from specforge_dflash.convolution import BlockConvolution
from specforge_dflash.dflash2_module import with_target
from specforge_dflash.dspark_module import confidence_losses
from specforge_dflash.model import DFlashDraftModel

if not ROOT.is_dir():
    pytest.skip(f"no golden cases: {ROOT} is not a folder (set SPECFORGE_GOLDEN)", allow_module_level=True)


class BlockCase:
    """One recorded run of a block drafter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return self.folder.name

    @property
    def tolerance(self) -> dict[str, float]:
        return {name: self.facts["tolerance"][name] for name in ("atol", "rtol")}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def draft(self) -> Any:
        draft = SpeculatorModel.from_pretrained(self.folder / "draft")
        draft.attach_verifier(str(self.folder / "verifier"), "train_only")
        return draft

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return {name: self.inputs[name][None] for name in ("input_ids", "loss_mask", "document_ids", "position_ids")}

    @cached_property
    def features(self) -> Features:
        aux = self.inputs["hidden_states"].unflatten(-1, (len(self.facts["sizes"]["aux_layer_ids"]), -1))
        return Features(aux[None], self.inputs["verifier_last_hidden_states"][None])

    @cached_property
    def rows(self) -> Tensor:
        """Row t of the block of each valid anchor t + 1."""
        return self.inputs["anchor_positions"][self.inputs["anchor_valid"]] - 1

    def recorded(self, name: str) -> Tensor:
        """Recorded values of the slots that predict, [blocks, S, ...]."""
        return self.expected[name][self.inputs["anchor_valid"]][:, self.draft.config.first_slot :]

    def states(self) -> Tensor:
        """The draft's states at these slots, [blocks, S, H']; every row of the batch is an anchor."""
        batch, steps = self.batch, self.draft.num_drafted
        with torch.no_grad():
            states = self.draft.unroll(
                batch["input_ids"], self.features, batch["position_ids"], batch["document_ids"], steps
            )
        return states[:, 0, self.rows].transpose(0, 1)

    @cached_property
    def supervised(self) -> Tensor:
        """The pairs of row and step that the reference counts, bool [S, N]."""
        supervised = torch.zeros(self.draft.num_drafted, self.batch["input_ids"].numel(), dtype=torch.bool)
        supervised[:, self.rows] = self.recorded("slot_loss_mask").T
        return supervised


CASES = [BlockCase(path.parent) for path in sorted(ROOT.rglob("case.json")) if path.parent.name[:2] in ("df", "ds")]
TRAINING = [case for case in CASES if not case.folder.name.endswith("decode")]
DECODING = [case for case in CASES if case.folder.name.endswith("decode")]


@pytest.fixture(params=TRAINING, ids=str, scope="module")
def case(request: pytest.FixtureRequest) -> BlockCase:
    return request.param


def width(case: BlockCase) -> int:
    return case.expected["states"].shape[-1]


def test_there_are_cases_of_each_kind() -> None:
    assert {case.facts["algorithm"] for case in TRAINING} == {"dflash", "dflash2", "dspark"} and DECODING


def test_states_and_logits(case: BlockCase) -> None:
    states = case.states()
    torch.testing.assert_close(states[..., : width(case)], case.recorded("states"), **case.tolerance)
    before = case.draft.slot_logits(states[..., : width(case)])
    logits = case.draft.logits(states) if case.facts["algorithm"] == "dspark" else before
    torch.testing.assert_close(logits, case.recorded("logits"), **case.tolerance)
    assert torch.equal(logits.argmax(-1), case.recorded("draft_tokens"))
    if case.facts["algorithm"] == "dspark":
        torch.testing.assert_close(before, case.recorded("base_logits"), **case.tolerance)
        torch.testing.assert_close(states[..., -1], case.recorded("confidence_logits"), **case.tolerance)


def test_exact_supervision_is_that_of_the_alignment(case: BlockCase) -> None:
    aligned = align(case.batch["loss_mask"], case.batch["document_ids"], case.draft.num_drafted)
    assert torch.equal(aligned.supervised.flatten(1)[:, case.rows].T, case.recorded("slots_exact"))


def confidence_in(rows: Distributions) -> Tensor:
    return (-argmax_cross_entropy(rows)).exp()


def rejection_among_draft_tokens(rows: Distributions) -> Tensor:
    """The reference ignores the verifier's probability of other tokens; ours counts it as rejected."""
    return total_variation(replace(rows, log_p_full=rows.log_p))


OBJECTIVES: dict[str, tuple[list[Term], ChainWeighting | None]] = {
    "kl_exp": ([Term("kl", 1.0, forward_kl)], None),
    "ce_exp": ([Term("argmax", 1.0, argmax_cross_entropy)], None),
    "ce_dpace": ([Term("argmax", 1.0, argmax_cross_entropy)], ChainWeighting(dpace, confidence_in)),
    "ce_tv_exp": ([Term("argmax", 0.1, argmax_cross_entropy), Term("tv", 0.9, rejection_among_draft_tokens)], None),
}


def weights_of(case: BlockCase, weighting: ChainWeighting | None) -> Tensor:
    """The reference's weights, with one denominator; they decay with the slot unless another weighting is given."""
    steps = torch.arange(case.draft.num_drafted)
    decay = torch.exp(-steps / case.facts["settings"]["gamma"]) if weighting is None else torch.ones(len(steps))
    return (decay / (case.supervised.sum() + 1e-5))[:, None].expand_as(case.supervised)


def compared(case: BlockCase, name: str, draft: Any) -> tuple[Drafted, DraftSteps, Tensor]:
    """Run the needed rows and compare them as in training."""
    terms, weighting = OBJECTIVES[name]
    rows = DraftRows.needed(case.supervised, DocumentLayout.of(case.batch["document_ids"]))
    targets = align(case.batch["loss_mask"], case.batch["document_ids"], draft.num_drafted).targets.flatten(1)
    drafted = Drafted(draft.states(case.batch, case.features, rows), rows.state_index(), targets, case.supervised)
    weights = weights_of(case, weighting)
    outcome = distill(
        draft.before_head(drafted.states)[:, : width(case)]
        if case.facts["algorithm"] == "dflash2"
        else draft.before_head(drafted.states),
        draft.head_weights,
        Teacher(case.features.last[0], draft.verifier_parts, draft.draft_ids),
        targets,
        case.supervised,
        terms,
        weights,
        state_index=drafted.state_index,
        weighting=weighting,
        further_head=draft.further_head,
        candidates=getattr(draft.config, "selector_top_k", 0),
    )
    return drafted, outcome, weights


def losses_of(case: BlockCase) -> list[str]:
    return [name for name in OBJECTIVES if f"loss_{name}" in case.expected]


def test_objectives_and_acceptance(case: BlockCase) -> None:
    assert losses_of(case)
    for name in losses_of(case):
        _, outcome, _ = compared(case, name, case.draft)
        expected = case.expected[f"loss_{name}"]
        if case.facts["algorithm"] == "dflash2":
            expected = case.expected[f"loss_{name}_unary"]
        if case.facts["algorithm"] == "dspark":
            expected = expected - case.expected[f"loss_{name}_confidence"]
        torch.testing.assert_close(outcome.loss.detach(), expected, **case.tolerance)
        if case.draft.draft_ids is None:  # decoding verifies with the verifier's complete distribution
            accepted = case.recorded("accept_rate_by_slot") * case.recorded("slot_loss_mask")
            torch.testing.assert_close(outcome.acceptance[:, case.rows].T, accepted, **case.tolerance)


def test_the_confidence_loss(case: BlockCase) -> None:
    if case.facts["algorithm"] != "dspark":
        pytest.skip("it has no confidence")
    for name in losses_of(case):
        drafted, _, weights = compared(case, name, case.draft)
        accepted = torch.zeros(case.supervised.shape)
        accepted[:, case.rows] = case.recorded("accept_rate_by_slot").T
        loss = (weights * confidence_losses(drafted, accepted)).sum()
        torch.testing.assert_close(loss.detach(), case.expected[f"loss_{name}_confidence"], **case.tolerance)


def test_the_selector(case: BlockCase) -> None:
    if case.facts["algorithm"] != "dflash2":
        pytest.skip("it has no selector")
    counted = case.supervised.nonzero(as_tuple=True)
    blocks = torch.full((case.supervised.shape[1],), -1)
    blocks[case.rows] = torch.arange(len(case.rows))
    for name in losses_of(case):
        drafted, outcome, weights = compared(case, name, case.draft)
        pairs = drafted.state_index[counted]
        candidates, index = with_target(outcome.candidates[pairs], outcome.verifier_tops[pairs])
        at = blocks[counted[1]], counted[0]
        assert torch.equal(candidates.sort().values, case.recorded("training_candidate_ids")[at].sort().values)
        log_q = case.draft.candidate_scores(drafted.states[pairs], candidates).log_softmax(-1)
        losses = torch.zeros(case.supervised.shape).index_put(counted, -log_q.gather(1, index[:, None])[:, 0])
        factors = torch.ones(losses.shape)
        if OBJECTIVES[name][1] is not None:
            factors = dpace((-losses.detach()).exp(), case.supervised)
        loss = (weights * factors * losses).sum().detach()
        torch.testing.assert_close(loss, case.expected[f"loss_{name}_selector"], **case.tolerance)


def test_written_as_read(case: BlockCase, tmp_path: Path) -> None:
    case.draft.save_pretrained(tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, case.folder / "draft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    config, read = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, case.folder / "draft"))
    assert {name: config[name] for name in read} == read


def without_documents(patch: pytest.MonkeyPatch) -> None:
    right = PackedBlocks.__init__

    def one_document(self: Any, document_ids: Tensor, *others: Any) -> None:
        right(self, torch.zeros_like(document_ids), *others)

    patch.setattr(PackedBlocks, "__init__", one_document)


def shifted_rows(by: int) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = PackedBlocks._visible

        def visible(self: Any, *given: Any) -> Tensor:
            moved = PackedBlocks.__new__(PackedBlocks)
            moved.__dict__ = {**self.__dict__, "rows": self.rows + by}
            return right(moved, *given)

        patch.setattr(PackedBlocks, "_visible", visible)

    return mutate


def causal_blocks(patch: pytest.MonkeyPatch) -> None:
    right = PackedBlocks._visible

    def visible(self: Any, part: Any, window: Any) -> Tensor:
        seen = right(self, part, window)
        others = torch.arange(part.blocks.start, part.blocks.stop)
        size = part.context.stop - part.context.start
        seen[..., size:] &= others <= self.slots[part.queries, None]
        return seen

    patch.setattr(PackedBlocks, "_visible", visible)


def later_positions(patch: pytest.MonkeyPatch) -> None:
    right = DFlashDraftModel.run

    def run(self: Any, tokens: Tensor, position_ids: Tensor, *others: Any) -> Tensor:
        return right(self, tokens, position_ids + 1, *others)

    patch.setattr(DFlashDraftModel, "run", run)


def without_convolution(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockConvolution, "forward", lambda self, states, *others, **more: states)


MUTATIONS = {
    "the context ends one row early": (shifted_rows(-1), "dflash-qwen3-packed"),
    "a block is causal": (causal_blocks, "dflash-qwen3-packed"),
    "blocks are one position later": (later_positions, "dflash-qwen3-packed"),
    "documents are ignored": (without_documents, "dflash-qwen3-packed"),
    "nothing is convolved": (without_convolution, "dflash2-qwen3-packed"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, folder = MUTATIONS[name]
    case = next(case for case in TRAINING if case.folder.name == folder)
    mutate(monkeypatch)
    error = (case.states()[..., : width(case)] - case.recorded("states")).abs().max()
    assert error > 100 * case.tolerance["atol"]


@pytest.mark.parametrize("decoded", DECODING, ids=str)
def test_real_decoding(decoded: BlockCase) -> None:
    verifier = load_verifier(str(decoded.folder / "verifier"))
    draft, expected, prompt = decoded.draft, decoded.expected, decoded.inputs["prompt"]
    proposal = GreedyTokenProposalConfig(speculative_tokens=draft.num_drafted)
    decoder = Decoder(verifier, draft, proposal, stop_tokens=[])
    emissions = list(decoder.decode([prompt], len(expected["text"]) - len(prompt)))
    assert [token for emission in emissions for token in emission.tokens] == expected["text"][len(prompt) :].tolist()
    accepted = [emission.accepted for emission in emissions if emission.drafted is not None]
    assert accepted == expected["accepted"][: len(accepted)].tolist() and len(accepted) >= len(expected["accepted"]) - 1


@pytest.mark.parametrize("decoded", DECODING, ids=str)
@torch.no_grad()
def test_each_round_of_the_drafter(decoded: BlockCase) -> None:
    verifier = load_verifier(str(decoded.folder / "verifier"))
    draft, expected = decoded.draft, decoded.expected
    text = expected["text"]
    features = capture(verifier, text[None], torch.arange(len(text))[None], draft.aux_layers)
    drafter, committed = draft.drafter(1), 0
    for number, root in enumerate(expected["round_start"].tolist()):
        new = slice(committed, root)
        some = Features(features.aux[:, new], features.last[:, new])
        drafter.commit(text[None, committed + 1 : root + 1], some, torch.tensor([root - committed]))
        committed, proposed = root, expected["proposed"][number]
        logits = [drafter.root]
        for depth, token in enumerate(proposed[:-1]):
            logits.append(drafter.step(token.view(1, 1), torch.tensor([[depth - 1]]))[0])
        found = torch.cat(logits)
        torch.testing.assert_close(found, expected["draft_logits"][number], **decoded.tolerance)
        assert torch.equal(found.argmax(-1), proposed)
        if "confidence_logits" in expected:
            before = torch.cat([text[root : root + 1], proposed[:-1]])[None]
            confidence = draft.confidence(drafter.states, before)[0]
            torch.testing.assert_close(confidence, expected["confidence_logits"][number], **decoded.tolerance)
