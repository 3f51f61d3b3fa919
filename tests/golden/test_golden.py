"""Parity with recorded runs of other tools.

Cases are found by their ``case.json`` (see ``support/golden_cases.py``), and dispatched by the algorithm and
format that it states; names, sizes and numbers are not assumed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import golden_cases
import layouts
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from specforge.hookspecs import Algorithm
from specforge.models.speculator import SpeculatorModel
from specforge.registry import installed
from specforge.training.losses.comparison import Term
from specforge.training.losses.distillation import DraftSteps, Teacher, distill
from specforge.training.losses.objectives import forward_kl
from specforge.verifier.features import Features, capture
from specforge.verifier.loading import load_verifier
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.config import default_aux_layers

PADDING = 3
# What specforge calls the formats of the cases.
FORMATS = {"eagle-raw": "eagle/eagle", "fms": "mlp/mlp_speculator", "midlayer": "eagle3/midlayer"}


@dataclass(frozen=True)
class Document:
    tokens: Tensor
    mask: Tensor
    states: Tensor


class Case:
    """One recorded run, and the batch that specforge makes of its raw tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return str(self.folder.relative_to(golden_cases.ROOT))

    @property
    def algorithm(self) -> str:
        return str(self.facts["algorithm"])

    @property
    def tolerance(self) -> dict[str, float]:
        return {name: self.facts["tolerance"][name] for name in ("atol", "rtol")}

    @property
    def steps(self) -> int:
        return int(self.facts["settings"]["ttt_steps"])

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def documents(self) -> list[Document]:
        names = [name.removeprefix("token_ids") for name in self.inputs if name.startswith("token_ids")]
        ordered = sorted(names, key=lambda name: int(name.removeprefix("_doc") or 0))
        parts = ("token_ids", "token_loss_mask", "verifier_hidden_states")
        return [Document(*(self.inputs[part + name] for part in parts)) for name in ordered]

    @property
    def is_packed(self) -> bool:
        return len(self.documents) > 1

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        """All documents in one row; several are followed by padding."""
        padding = PADDING if self.is_packed else 0
        columns: dict[str, list[Tensor]] = {"tokens": [], "mask": [], "documents": [], "positions": []}
        for number, document in enumerate(self.documents):
            length = document.tokens.numel()
            columns["tokens"].append(document.tokens)
            columns["mask"].append(document.mask)
            columns["documents"].append(torch.full((length,), number))
            columns["positions"].append(torch.arange(length))
        fill = {"tokens": 0, "mask": False, "documents": -1, "positions": 0}
        for name, values in columns.items():
            values.append(torch.full((padding,), fill[name], dtype=values[0].dtype))
        return {name: torch.cat(values)[None] for name, values in columns.items()}

    @cached_property
    def states(self) -> Tensor:
        """Recorded states of the batch's tokens, [1, T, n + 1, H]; zero on padding."""
        states = torch.cat([document.states for document in self.documents])
        missing = self.batch["tokens"].shape[1] - states.shape[0]
        return torch.cat([states, states.new_zeros(missing, *states.shape[1:])])[None]

    @cached_property
    def rows(self) -> Tensor:
        """Index into the batch of each recorded row: all tokens of a document but its last."""
        begin, rows = 0, []
        for document in self.documents:
            length = document.tokens.numel()
            rows.append(torch.arange(begin, begin + length - 1))
            begin += length
        return torch.cat(rows)

    def recorded(self, step: int) -> Tensor:
        """Which of the recorded rows without padding are compared at a step."""
        if self.is_packed:
            return self.expected[f"rows_step{step}"][: self.rows.numel()]
        return torch.ones(self.rows.numel(), dtype=torch.bool)


CASES = [Case(folder) for folder in golden_cases.CASES]


@pytest.fixture(scope="module", params=CASES, ids=str)
def any_case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module", params=[case for case in CASES if case.algorithm == "eagle3"], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def draft(case: Case) -> Any:
    return attached_draft(case)


@pytest.fixture(scope="module", params=[case for case in CASES if case.algorithm == "eagle"], ids=str)
def feature_case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def feature_draft(feature_case: Case) -> Any:
    return attached_draft(feature_case)


@pytest.fixture(scope="module", params=[case for case in CASES if case.algorithm == "mlp"], ids=str)
def head_case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def head_draft(head_case: Case) -> Any:
    return attached_draft(head_case)


@pytest.fixture(scope="module")
def hidden(case: Case, draft: Any) -> Tensor:
    """States after the draft's final norm, at the recorded rows of each step, [S, rows, H]."""
    batch = case.batch
    with torch.no_grad():
        states = draft(
            batch["tokens"], case.states[:, :, :-1], batch["positions"], batch["documents"], steps=case.steps
        )
    return states[:, 0]


def require(algorithm: str) -> None:
    if algorithm not in installed().all(Algorithm):
        pytest.skip(f"no installed plugin provides {algorithm!r}")


def attached_draft(case: Case) -> Any:
    require(case.algorithm)
    model = read_draft(case, case.folder / "draft")
    model.attach_verifier(str(case.folder / "verifier"), "train_only")
    return model


def read_draft(case: Case, folder: Path) -> Any:
    if case.facts["format"] == "speculators":
        return SpeculatorModel.from_pretrained(folder)
    return layouts.read(FORMATS[case.facts["format"]], folder, str(case.folder / "verifier"))


def write_draft(case: Case, model: Any, folder: Path) -> None:
    if case.facts["format"] == "speculators":
        model.save_pretrained(folder)
    else:
        layouts.write(FORMATS[case.facts["format"]], model, folder)


def read_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_there_are_cases() -> None:
    assert CASES, f"{golden_cases.ROOT} holds no case.json"


def test_every_algorithm_is_checked(any_case: Case) -> None:
    require(any_case.algorithm)
    assert any_case.algorithm in {"eagle3", "eagle", "mlp", "mtp", "peagle", "dflash", "dflash2", "dspark"}, (
        "a plugin provides this algorithm, but no test here runs its cases"
    )


def test_recorded_rows_are_found(case: Case) -> None:
    """Row i of the reference reads x[i+1] at position i+1, which the other tests assume."""
    require(case.algorithm)
    count = case.rows.numel()
    assert torch.equal(case.batch["tokens"][0, case.rows + 1], case.inputs["input_ids"][:count])
    assert torch.equal(case.batch["positions"][0, case.rows + 1], case.inputs["position_ids"][:count])
    assert torch.equal(case.batch["documents"][0, case.rows + 1], case.inputs["document_ids"][:count])
    assert bool((case.inputs["document_ids"][count:] == -1).all())


def test_capture(case: Case, draft: Any) -> None:
    verifier = load_verifier(str(case.folder / "verifier"))
    batch, layers = case.batch, case.facts["sizes"]["aux_layer_ids"]
    features = capture(verifier, batch["tokens"], batch["positions"], layers)
    real = case.batch["documents"] >= 0
    torch.testing.assert_close(features.aux[real], case.states[:, :, :-1][real], **case.tolerance)
    torch.testing.assert_close(features.last[real], case.states[:, :, -1][real], **case.tolerance)


def test_aux_layers_of_the_config(case: Case, draft: Any) -> None:
    ids = draft.config.eagle_aux_hidden_state_layer_ids
    if ids is None:
        ids = default_aux_layers(AutoConfig.from_pretrained(case.folder / "verifier").num_hidden_layers)
    elif case.facts["format"] != "speculators":
        assert "eagle_config" not in read_json(case.folder / "draft")
    assert ids == case.facts["sizes"]["aux_layer_ids"]


def test_draft_logits(case: Case, draft: Any, hidden: Tensor) -> None:
    for step in range(case.steps):
        compared = case.recorded(step)
        expected = case.expected[f"logits_step{step}"][: compared.numel()][compared]
        with torch.no_grad():
            logits = draft.lm_head(hidden[step, case.rows][compared])
        torch.testing.assert_close(logits, expected, **case.tolerance)
        ids = logits.argmax(-1)
        assert torch.equal(ids, case.expected[f"draft_tokens_step{step}"][: compared.numel()][compared])
        if draft.draft_ids is not None:
            tokens = case.expected[f"target_token_ids_step{step}"][: compared.numel()][compared]
            assert torch.equal(draft.draft_ids[ids], tokens)


def test_target_logits(case: Case, draft: Any) -> None:
    parts = VerifierParts.from_pretrained(str(case.folder / "verifier"))
    logits = parts.logits(case.states[0, case.rows + 1, -1])
    if draft.draft_ids is not None:
        assert torch.equal(draft.t2d.nonzero().squeeze(1), draft.draft_ids)
        logits = logits[:, draft.draft_ids]
    torch.testing.assert_close(logits, case.expected["target_logits"][: case.rows.numel()], **case.tolerance)


def reference_loss(case: Case, draft: Any, hidden: Tensor, steps: int) -> tuple[DraftSteps, Tensor]:
    """Run our loss with the reference's rows and denominators; also return the weight of each step."""
    length = case.batch["tokens"].shape[1]
    documents, mask = case.batch["documents"][0], case.batch["mask"][0]
    offset = 1 + torch.arange(steps)[:, None] + torch.arange(length)
    targets = offset.clamp(max=length - 1)
    inside = (offset < length) & (documents >= 0) & (documents[targets] == documents)
    supervised = inside & mask[targets]
    decay = case.facts["settings"]["ttt_step_loss_decay"] ** torch.arange(steps)
    weights = decay / (supervised.sum(1) + 1e-5)
    teacher = Teacher(case.states[0, :, -1], draft.verifier_parts, draft.draft_ids)
    terms = [Term("kl", 1.0, forward_kl)]
    by_pair = weights[:, None].expand_as(supervised)
    outcome = distill(hidden[:steps], draft.lm_head.weight, teacher, targets, supervised, terms, by_pair)
    return outcome, weights


def test_loss(case: Case, draft: Any, hidden: Tensor) -> None:
    steps = sum(f"loss_step{step}" in case.expected for step in range(case.steps))
    assert steps, "no loss is recorded"
    outcome, weights = reference_loss(case, draft, hidden, steps)
    for step in range(steps):
        ours = outcome.terms["kl"][step] * weights[step]
        torch.testing.assert_close(ours, case.expected[f"loss_step{step}"], **case.tolerance)
    if "loss_total" in case.expected:
        assert steps == case.steps
        torch.testing.assert_close(outcome.loss, case.expected["loss_total"], **case.tolerance)


def assert_written_as_read(case: Case, draft: Any, folder: Path) -> None:
    """A written draft has the keys, shapes, dtypes and values that were read."""
    write_draft(case, draft, folder)
    ours = load_file(folder / "model.safetensors")
    theirs = load_file(case.folder / "draft" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


def test_written_tensors_are_bit_equal(case: Case, draft: Any, tmp_path: Path) -> None:
    assert_written_as_read(case, draft, tmp_path)


def test_written_config_is_equal(case: Case, draft: Any, tmp_path: Path) -> None:
    write_draft(case, draft, tmp_path / "written")
    theirs, ours = read_json(case.folder / "draft"), read_json(tmp_path / "written")
    if case.facts["format"] == "speculators":
        known = [name for name in type(draft.config).model_fields if name in theirs]
        layers = theirs["transformer_layer_config"]
        assert {name: ours["transformer_layer_config"].get(name) for name in layers} == layers
        known.remove("transformer_layer_config")
    else:
        # The rotary base is written under the key of transformers 5, and a missing dtype is that of the weights.
        known = [name for name in theirs if name not in ("rope_theta", "rope_scaling", "torch_dtype", "dtype")]
        base = theirs.get("rope_theta", theirs.get("rope_parameters", {}).get("rope_theta"))
        assert ours["rope_parameters"]["rope_theta"] == base
    assert {name: ours.get(name) for name in known} == {name: theirs[name] for name in known}


def test_written_draft_computes_the_same(case: Case, draft: Any, hidden: Tensor, tmp_path: Path) -> None:
    write_draft(case, draft, tmp_path / "written")
    again = read_draft(case, tmp_path / "written")
    again.attach_verifier(draft.verifier_parts)
    batch = case.batch
    with torch.no_grad():
        states = again(
            batch["tokens"], case.states[:, :, :-1], batch["positions"], batch["documents"], steps=case.steps
        )
    assert torch.equal(states[:, 0], hidden)


# EAGLE-1, EAGLE-2, HASS.


def predictions(case: Case, draft: Any) -> tuple[Tensor, Tensor]:
    """Run one teacher-forced pass as in the reference; features [rows, H] and logits [rows, V]."""
    tokens, states = case.inputs["input_ids"][None], case.inputs["hidden_states"][None]
    with torch.no_grad():
        output = draft(
            tokens,
            states,
            attention_mask=case.inputs["attention_mask"][None],
            position_ids=case.inputs["position_ids"][None],
            output_hidden_states=True,
            return_dict=True,
        )
    return output.hidden_states[-1][0], output.logits[0]


def assert_as_recorded(case: Case, draft: Any, features: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(features, case.expected["features"], **case.tolerance)
    torch.testing.assert_close(logits, case.expected["logits"], **case.tolerance)
    assert torch.equal(logits.argmax(-1), case.expected["draft_tokens"])
    if "features_post_layernorm" in case.expected:
        expected = case.expected["features_post_layernorm"]
        torch.testing.assert_close(draft.before_head(features), expected, **case.tolerance)


def test_recorded_rows_of_one_pass_are_found(feature_case: Case) -> None:
    """Row i of the reference reads x[i+1] at position i, with the state of x[i] after the final norm."""
    inputs = feature_case.inputs
    tokens = inputs["token_ids"]
    assert torch.equal(inputs["input_ids"], tokens[1:])
    assert torch.equal(inputs["position_ids"], torch.arange(len(tokens) - 1))
    assert torch.equal(inputs["hidden_states"], inputs["verifier_post_norm"][:-1])


def test_capture_of_the_last_state(feature_case: Case, feature_draft: Any) -> None:
    verifier = load_verifier(str(feature_case.folder / "verifier"))
    tokens = feature_case.inputs["token_ids"][None]
    features = capture(verifier, tokens, torch.arange(tokens.shape[1])[None], feature_draft.aux_layers)
    torch.testing.assert_close(features.last[0], feature_case.inputs["verifier_pre_norm"], **feature_case.tolerance)
    read = feature_draft.first_feature(features)
    torch.testing.assert_close(read[0], feature_case.inputs["verifier_post_norm"], **feature_case.tolerance)


@torch.no_grad()
def test_one_pass(feature_case: Case, feature_draft: Any) -> None:
    assert_as_recorded(feature_case, feature_draft, *predictions(feature_case, feature_draft))


@torch.no_grad()
def test_the_first_step_of_a_chain(feature_case: Case, feature_draft: Any) -> None:
    inputs = feature_case.inputs
    tokens = inputs["token_ids"][None]
    positions = torch.arange(tokens.shape[1])[None]
    last = inputs["verifier_pre_norm"][None]
    features = Features(last.new_empty(*last.shape[:2], 0, last.shape[2]), last)
    hidden = feature_draft.unroll(tokens, features, positions, torch.zeros_like(positions), steps=3)[0, 0, :-1]
    assert_as_recorded(feature_case, feature_draft, hidden, feature_draft.logits(hidden))


def test_written_features_draft_is_as_read(feature_case: Case, feature_draft: Any, tmp_path: Path) -> None:
    assert_written_as_read(feature_case, feature_draft, tmp_path)
    theirs, ours = read_json(feature_case.folder / "draft"), read_json(tmp_path)
    layers = feature_draft.config.transformer_layer_config
    if feature_case.facts["format"] == "speculators":
        known = [name for name in type(feature_draft.config).model_fields if name in theirs]
        known.remove("transformer_layer_config")
        read = type(layers)(**ours["transformer_layer_config"])
        assert read.to_dict() == type(layers)(**theirs["transformer_layer_config"]).to_dict()
    else:
        # A missing dtype is that of the weights.
        known = [name for name in theirs if name not in ("torch_dtype", "dtype")]
        base = theirs.get("rope_theta", theirs.get("rope_parameters", {}).get("rope_theta"))
        assert ours["rope_parameters"]["rope_theta"] == ours["rope_theta"] == base
    assert {name: ours.get(name) for name in known} == {name: theirs[name] for name in known}


def test_written_features_draft_computes_the_same(feature_case: Case, feature_draft: Any, tmp_path: Path) -> None:
    write_draft(feature_case, feature_draft, tmp_path)
    again = read_draft(feature_case, tmp_path)
    again.attach_verifier(feature_draft.verifier_parts)
    for ours, theirs in zip(predictions(feature_case, again), predictions(feature_case, feature_draft), strict=True):
        assert torch.equal(ours, theirs)


# MLP speculators.


def assert_heads_as_recorded(case: Case, logits: Tensor) -> None:
    torch.testing.assert_close(logits, case.expected["logits"], **case.tolerance)
    assert torch.equal(logits.argmax(-1), case.expected["draft_tokens"])


@torch.no_grad()
def predictions_of_heads(case: Case, draft: Any) -> Tensor:
    """Logits of all heads for the reference's inputs, [n, T, V]."""
    logits: Tensor = draft(case.inputs["inds"][None], case.inputs["state"][None])
    return logits[:, 0]


def test_recorded_rows_of_heads_are_found(head_case: Case) -> None:
    """Row t holds the state of x[t] after the final norm; head i reads x[t+1+i] there and predicts x[t+2+i]."""
    inputs, targets = head_case.inputs, head_case.expected["target_token_ids"]
    heads, rows = targets.shape
    assert torch.equal(inputs["inds"], inputs["token_ids"][1:])
    assert torch.equal(inputs["state"], inputs["verifier_post_norm"][:rows])
    for head in range(heads):
        assert torch.equal(targets[head], inputs["token_ids"][2 + head : 2 + head + rows])


def test_heads(head_case: Case, head_draft: Any) -> None:
    assert_heads_as_recorded(head_case, predictions_of_heads(head_case, head_draft))


@torch.no_grad()
def test_heads_on_captured_states(head_case: Case, head_draft: Any) -> None:
    verifier = load_verifier(str(head_case.folder / "verifier"))
    tokens = head_case.inputs["token_ids"][None]
    positions = torch.arange(tokens.shape[1])[None]
    features = capture(verifier, tokens, positions, head_draft.aux_layers)
    torch.testing.assert_close(features.last[0], head_case.inputs["verifier_pre_norm"], **head_case.tolerance)
    heads, rows = head_case.expected["draft_tokens"].shape
    hidden = head_draft.unroll(tokens, features, positions, torch.zeros_like(positions), heads)[:, 0, :rows]
    logits = torch.stack([head_draft.logits(hidden[step], step) for step in range(heads)])
    assert_heads_as_recorded(head_case, logits)


def test_written_heads_are_as_read(head_case: Case, head_draft: Any, tmp_path: Path) -> None:
    assert_written_as_read(head_case, head_draft, tmp_path)
    theirs, ours = read_json(head_case.folder / "draft"), read_json(tmp_path)
    assert {name: ours.get(name) for name in theirs} == theirs


def test_written_heads_compute_the_same(head_case: Case, head_draft: Any, tmp_path: Path) -> None:
    write_draft(head_case, head_draft, tmp_path)
    again = read_draft(head_case, tmp_path)
    assert torch.equal(predictions_of_heads(head_case, again), predictions_of_heads(head_case, head_draft))
