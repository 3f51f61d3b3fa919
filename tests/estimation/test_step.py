"""A step without values against the real one, for every algorithm, on the quickstart's verifier."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig

from specforge.documents import DocumentLayout
from specforge.errors import SpecforgeError
from specforge.estimation.shapes import MORE_FORMULAS
from specforge.estimation.step import HEAD, LAYERS, VERIFIER, DryRun
from specforge.hookspecs import Algorithm
from specforge.models.chain.alignment import align
from specforge.registry import installed
from specforge.training.losses import chunks
from specforge.training.module import DraftModule
from specforge.training.optimizers import OptimizerSettings
from specforge.verifier.loading import load_verifier
from specforge.verifier.parts import VerifierParts
from specforge_dflash.settings import DFlash2DraftSettings, DFlashDraftSettings, DSparkDraftSettings
from specforge_draft_model.start import DraftModelSettings
from specforge_eagle3.module import Eagle3DraftSettings
from specforge_mlp.module import MLPDraftSettings
from specforge_peagle.module import PEagleDraftSettings

VERIFIER_FOLDER = str(Path(__file__).parents[2] / "configs" / "quickstart" / "verifier")
MUON = OptimizerSettings(name="muon", lr=1e-2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle3": ("eagle3", {"ttt_steps": 3, "draft": Eagle3DraftSettings(draft_vocab_size=512)}),
    "eagle3 with muon and fading loss": (
        "eagle3",
        {
            "ttt_steps": 2,
            "draft": Eagle3DraftSettings(draft_vocab_size=None),
            "objective": {"lk_lambda": 1.0},
            "optimizer": MUON,
        },
    ),
    "eagle3 with activations recomputed": (
        "eagle3",
        {"ttt_steps": 3, "draft": Eagle3DraftSettings(draft_vocab_size=512), "activation_checkpointing": True},
    ),
    "eagle": ("eagle", {}),
    "hass": ("eagle", {"alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0}}),
    "mlp": ("mlp", {}),
    "dflash": ("dflash", {"anchors": 8, "draft": DFlashDraftSettings(num_layers=2, draft_vocab_size=512)}),
    "dflash2": ("dflash2", {"anchors": 8, "draft": DFlash2DraftSettings(num_layers=1, selector_rank=16)}),
    "dspark with activations recomputed": (
        "dspark",
        {"anchors": 8, "draft": DSparkDraftSettings(num_layers=2), "activation_checkpointing": True},
    ),
    "peagle": (
        "peagle",
        {"depths": 3, "draft": PEagleDraftSettings(num_layers=1, draft_vocab_size=512), "down_sample_ratio": 1.0},
    ),
    "draft model": ("draft_model", {"draft": DraftModelSettings(init_layers=[0, 7])}),
    "mlp untied": ("mlp", {"draft": MLPDraftSettings(num_layers=2, tie_weights=False), "optimizer": MUON}),
}


def make_module(name: str, settings: dict[str, Any]) -> DraftModule:
    """Create an algorithm's module as the command line does."""
    module_class = installed().load(installed().find(Algorithm, name), "module")
    module: DraftModule = module_class(verifier=VERIFIER_FOLDER, **settings)
    return module


def make_trainer() -> Trainer:
    return Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Two rows of two documents with padding, prompts first."""
    lengths = [40, 90, 60, 50]
    documents = torch.full((2, 130), -1)
    positions, mask = torch.zeros_like(documents), torch.zeros_like(documents, dtype=torch.bool)
    for number, length in enumerate(lengths):
        row, begin = number // 2, (number % 2) * lengths[number - 1]
        span = slice(begin, begin + length)
        documents[row, span], positions[row, span] = number % 2, torch.arange(length)
        mask[row, span] = torch.arange(length) >= length // 3
    tokens = torch.randint(3, 300, documents.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "loss_mask": mask, "document_ids": documents, "position_ids": positions}


class RealStep:
    """The same step with values, on verifier and draft in float32."""

    def __init__(self, module: DraftModule) -> None:
        self.module, self._trainer = module, make_trainer()
        module.trainer = self._trainer
        verifier = load_verifier(VERIFIER_FOLDER)
        parts = VerifierParts.of(verifier)
        counts = torch.zeros(parts.config.vocab_size, dtype=torch.int64)
        data: Any = SimpleNamespace(vocabulary_counts=lambda: counts)
        module.teacher.hold(verifier, parts)
        module.create_draft(data)
        module.train()
        self.optimizer = module.configure_optimizers()["optimizer"]

    def run(self, batch: dict[str, torch.Tensor]) -> None:
        """Run a step in Lightning's order."""
        outcome = self.module.draft_steps(batch, self.module.features(batch))
        self.optimizer.zero_grad()
        outcome.loss.backward()
        del outcome
        self.optimizer.step()


def most_allocated(step: RealStep, batch: dict[str, torch.Tensor]) -> int:
    """Return the peak bytes that a step allocates on top of existing memory, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step.run(batch)
    now = most = 0
    assert found.profiler is not None
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_real_one(case, batch):
    real = RealStep(make_module(*CASES[case]))
    real.run(batch)
    with FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as counted:
        real.run(batch)
    module = make_module(*CASES[case])
    cost = DryRun(module, make_trainer(), torch.float32).run(batch)

    assert sum(cost.flops.values()) == counted.get_total_flops()

    draft, verifier = real.module.draft, real.module.teacher.model
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    assert cost.trained == sum(parameter.numel() for parameter in trained)
    assert cost.memory.draft == sum(tensor.nbytes for tensor in [*draft.parameters(), *draft.buffers()])
    assert cost.memory.verifier == sum(tensor.nbytes for tensor in [*verifier.parameters(), *verifier.buffers()])
    assert cost.memory.gradients == sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    states = list(real.optimizer.state.values())
    moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    assert cost.memory.optimizer == sum(moment.nbytes for moment in moments)

    standing = cost.memory.verifier + cost.memory.draft + cost.memory.gradients + cost.memory.optimizer
    # Gradients of tensors without values are never accumulated in place, so a little more is counted.
    allocated = most_allocated(real, batch)
    assert 0.97 * allocated < cost.memory.peak - standing < 1.2 * allocated


def test_an_accelerator_uses_larger_chunks_with_the_same_operations(batch, monkeypatch):
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 1)
    monkeypatch.setattr(chunks, "LEAST_TARGETS", 2)
    case = CASES["eagle3"]
    here = DryRun(make_module(*case), make_trainer(), torch.float32).run(batch)
    there = DryRun(make_module(*case), make_trainer(), torch.float32, on_accelerator=True).run(batch)
    assert there.flops == here.flops
    assert there.memory.draft_work > 2 * here.memory.draft_work
    assert not chunks.for_accelerator.get()


def test_parts_of_a_step_add_up_by_hand(batch):
    """EAGLE-1: a fusion and keys for each position, a layer and heads for each supervised one."""
    module = make_module("eagle", {})
    config = module.teacher.config
    cost = DryRun(module, make_trainer(), torch.float32).run(batch)
    positions = batch["input_ids"].numel()
    width, inner = config.hidden_size, config.intermediate_size
    heads, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = width * (2 * heads + 2 * shared) + 3 * width * inner
    # Each document attends to itself, padded to the longest of its group.
    pairs = sum(group.shape[0] * group.shape[1] ** 2 for group in DocumentLayout.of(batch["document_ids"]).groups)
    scores = 2 * pairs * 2 * heads
    verifier = config.num_hidden_layers * (2 * positions * layer + scores)
    assert cost.flops[VERIFIER] == pytest.approx(verifier, rel=0.01)
    # The first input is the verifier's and gets no gradient.
    fusion = 2 * 2 * positions * 2 * width * width
    supervised = align(batch["loss_mask"], batch["document_ids"], 1).supervised.sum().item()
    # Queries and outputs of the other rows are computed but not used.
    keys = (positions - supervised) * (3 * 2 * 2 * shared + 2 * 2 * heads) * width
    by_hand = 3 * 2 * supervised * layer + keys + fusion
    # Attention is two products, and five in the backward pass, only at the supervised positions.
    assert by_hand < cost.flops[LAYERS] < by_hand + 3.5 * scores
    # The heads of verifier and draft, and the gradient of the draft head's input; its weights are frozen.
    assert cost.flops[HEAD] == pytest.approx(3 * 2 * supervised * width * config.vocab_size, rel=0.01)


def test_recomputed_activations_are_not_kept(batch):
    kept, recomputed = (
        DryRun(make_module(*CASES[case]), make_trainer(), torch.float32).run(batch).memory.kept
        for case in ("eagle3", "eagle3 with activations recomputed")
    )
    assert recomputed < 0.3 * kept


def test_memory_follows_the_precision(batch):
    wide = DryRun(make_module("eagle", {}), make_trainer(), torch.float32).run(batch).memory
    mixed_trainer = Trainer(accelerator="cpu", devices=1, precision="bf16-mixed", logger=False, max_steps=1)
    mixed = DryRun(make_module("eagle", {}), mixed_trainer, torch.bfloat16).run(batch).memory
    short_trainer = Trainer(accelerator="cpu", devices=1, precision="bf16-true", logger=False, max_steps=1)
    short = DryRun(make_module("eagle", {}), short_trainer, torch.bfloat16).run(batch).memory
    assert mixed.verifier == pytest.approx(wide.verifier / 2, rel=0.01)
    assert mixed.draft == wide.draft
    assert mixed.gradients == wide.gradients
    assert mixed.kept < wide.kept
    assert short.draft == pytest.approx(wide.draft / 2, rel=0.01)
    assert short.gradients == wide.gradients / 2


class TestExperts:
    @staticmethod
    def dry_run(folder: Path, width: int, dtype: torch.dtype) -> DryRun:
        Qwen3MoeConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=width,
        ).save_pretrained(folder)
        module_class = installed().load(installed().find(Algorithm, "mlp"), "module")
        return DryRun(module_class(verifier=str(folder)), make_trainer(), dtype)

    def test_each_token_passes_its_chosen_experts(self, tmp_path, batch):
        batch = {**batch, "input_ids": batch["input_ids"] % 61}
        costs = [self.dry_run(tmp_path, width, torch.bfloat16).run(batch) for width in (8, 24)]
        two_layers_of_two_experts = 2 * 2 * batch["input_ids"].numel() * 3 * 2 * 16 * (24 - 8)
        assert costs[1].flops[VERIFIER] - costs[0].flops[VERIFIER] == two_layers_of_two_experts

    def test_a_step_that_reads_values_is_rejected(self, tmp_path, batch):
        with pytest.raises(SpecforgeError, match=r"cannot be run without values: .*--verifier_dtype bfloat16"):
            self.dry_run(tmp_path, 8, torch.float32).run(batch)
