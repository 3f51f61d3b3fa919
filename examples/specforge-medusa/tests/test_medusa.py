"""Tests of the heads against their equation, in training and decoding, and of lossless text."""

from __future__ import annotations

import json
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.registry import installed
from specforge.sampling import RandomSource, Sampling
from specforge.training.losses.objectives import Distributions
from specforge.verifier.features import Features, capture
from specforge.verifier.parts import VerifierParts
from specforge_medusa.command import run
from specforge_medusa.config import MedusaConfig
from specforge_medusa.data import MedusaDataModule
from specforge_medusa.model import MedusaModel
from specforge_medusa.module import MedusaModule
from specforge_medusa.objectives import top_token_cross_entropy
from specforge_medusa.proposal import SparseTreeProposer, SparseTreeTokenProposalConfig

HEADS, WIDTH, VOCABULARY = 3, 16, 29
NO_DATA: Any = None


@pytest.fixture
def verifier() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture
def draft(verifier: LlamaForCausalLM) -> MedusaModel:
    model = MedusaModel(MedusaConfig(hidden_size=WIDTH, vocab_size=VOCABULARY, num_heads=HEADS)).double()
    model.attach_verifier(verifier)
    return model


def random_states(batch: int, length: int) -> Features:
    return Features(torch.empty(batch, length, 0, WIDTH), torch.randn(batch, length, WIDTH, dtype=torch.float64))


@torch.no_grad()
def test_training_computes_the_equation(draft: MedusaModel) -> None:
    features = random_states(2, 5)
    nothing = torch.zeros(2, 5, dtype=torch.int64)
    hidden = draft.unroll(nothing, features, nothing, nothing, HEADS)
    weights = draft.state_dict()
    state = draft.verifier_parts.norm(features.last[1, 3])
    for head in range(HEADS):
        inner = weights[f"block.{head}.weight"] @ state + weights[f"block.{head}.bias"]
        expected = weights[f"lm_head.{head}.weight"] @ (state + inner * torch.sigmoid(inner))
        torch.testing.assert_close(draft.logits(hidden[head], head)[1, 3], expected)


def test_more_steps_than_heads_are_refused(draft: MedusaModel) -> None:
    nothing = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(UsageError, match="has 3 heads, but 4 steps"):
        draft.unroll(nothing, random_states(1, 5), nothing, nothing, HEADS + 1)


def test_heads_start_as_the_verifiers_own(draft: MedusaModel) -> None:
    draft.borrow_weights()
    features = random_states(1, 4)
    nothing = torch.zeros(1, 4, dtype=torch.int64)
    hidden = draft.unroll(nothing, features, nothing, nothing, HEADS)
    for head in range(HEADS):
        torch.testing.assert_close(draft.logits(hidden[head], head), draft.verifier_parts.logits(features.last))


@torch.no_grad()
def test_a_node_uses_the_head_of_its_depth(draft: MedusaModel) -> None:
    features, counts = random_states(2, 5), torch.tensor([3, 5])
    nothing = torch.zeros(2, 5, dtype=torch.int64)
    hidden = draft.unroll(nothing, features, nothing, nothing, HEADS)
    trained = torch.stack([draft.logits(hidden[head], head) for head in range(HEADS)])
    drafter = draft.drafter(2)
    drafter.commit(nothing, features, counts)
    torch.testing.assert_close(drafter.root, trained[0, [0, 1], counts - 1])
    drafter.step(torch.tensor([[4, 9], [7, 4]]), torch.tensor([[-1, -1], [-1, -1]]))
    below = drafter.step(torch.tensor([[8, 2], [5, 3]]), torch.tensor([[0, -1], [-1, 1]]))
    expected = [[trained[2, 0, 2], trained[1, 0, 2]], [trained[1, 1, 4], trained[2, 1, 4]]]
    torch.testing.assert_close(below, torch.stack([torch.stack(row) for row in expected]))


@pytest.mark.parametrize(
    "proposal", ["greedy:speculative_tokens=3", "static_tree:depth=3", "dynamic_tree:depth=3", "medusa_tree"]
)
def test_the_text_is_the_verifiers_own(draft: MedusaModel, verifier: LlamaForCausalLM, proposal: str) -> None:
    prompt = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    expected = verifier.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert torch.equal(draft.generate(prompt, max_new_tokens=20, proposal=proposal), expected)


def test_the_tree_holds_the_paths_whose_ranks_have_a_small_product(draft: MedusaModel) -> None:
    drafter = draft.drafter(2)
    drafter.commit(torch.zeros(2, 5, dtype=torch.int64), random_states(2, 5), torch.tensor([5, 3]))
    by_head = drafter.by_head.argsort(-1, descending=True)
    config = SparseTreeTokenProposalConfig(breadth=5, depth=3)
    proposal = SparseTreeProposer(config, Sampling(), RandomSource()).propose([], drafter)
    for row in range(2):
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(proposal.tokens[row].tolist(), proposal.parents[row].tolist(), strict=True):
            above = () if parent < 0 else paths[parent]
            paths.append((*above, by_head[row, len(above)].tolist().index(token) + 1))
        every = (path for depth in (1, 2, 3) for path in product(range(1, 6), repeat=depth))
        assert sorted(paths) == sorted(path for path in every if prod(path) <= 5)


def test_rows_too_short_for_the_last_head_are_dropped(tmp_path: Path, verifier: LlamaForCausalLM) -> None:
    verifier.save_pretrained(tmp_path / "verifier")
    masks = [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    rows = [{"input_ids": list(range(1, len(mask) + 1)), "loss_mask": mask} for mask in masks]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    data = MedusaDataModule(verifier=str(tmp_path / "verifier"), cache_dir=str(tmp_path / "cache"), **sources)
    data.prepare_data()
    data.setup()
    assert [data.train_rows[number]["loss_mask"].tolist() for number in range(2)] == [masks[0], masks[3]]
    assert data.validation_rows is not None and len(data.validation_rows) == len(masks)
    assert "2 response too short for the heads" in data.summary_text()


def test_a_stored_draft_is_found_by_its_name(draft: MedusaModel, tmp_path: Path) -> None:
    draft.save_pretrained(tmp_path)
    loaded = SpeculatorModel.from_pretrained(tmp_path)
    assert isinstance(loaded, MedusaModel)
    own = draft.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())


def test_the_subcommand_names_what_a_draft_lacks(draft: MedusaModel, tmp_path: Path) -> None:
    draft.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="name_or_path is missing"):
        run([str(tmp_path), "--prompt", "What?"])


def test_the_objective_reads_the_verifiers_best_token() -> None:
    log_q = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    log_p = torch.log(torch.tensor([[0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]))
    torch.testing.assert_close(
        top_token_cross_entropy(Distributions(log_q, log_p, log_p)), -torch.log(torch.tensor([0.3, 0.8]))
    )


@pytest.mark.parametrize("objective", ["text", "medusa_top_token"])
def test_steps_of_training_lower_the_loss(verifier: LlamaForCausalLM, tmp_path: Path, objective: str) -> None:
    verifier.float().save_pretrained(tmp_path)
    module = MedusaModule(verifier=str(tmp_path), heads=HEADS, objective={objective: 1.0})
    module.teacher.hold(verifier, VerifierParts.of(verifier))
    module.create_draft(NO_DATA)
    optimizer = torch.optim.AdamW(module.draft.parameters(), lr=1e-2)
    tokens = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, -1)
    batch = {
        "input_ids": tokens,
        "loss_mask": torch.ones_like(tokens, dtype=torch.bool),
        "document_ids": torch.zeros_like(tokens),
        "position_ids": positions,
    }
    losses = []
    for _ in range(20):
        outcome = module.draft_steps(batch, capture(verifier, tokens, positions, module.aux_layers))
        losses.append(outcome.loss.item())
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
    assert list(outcome.terms) == [objective]
    assert losses[-1] < losses[0] / 2


def test_a_trained_module_is_loaded_from_its_checkpoint(verifier: LlamaForCausalLM, tmp_path: Path) -> None:
    verifier.float().save_pretrained(tmp_path / "verifier")
    row = json.dumps({"input_ids": list(range(1, 13)), "loss_mask": [0, 0] + [1] * 10})
    (tmp_path / "rows.jsonl").write_text("\n".join([row] * 4))
    rows = str(tmp_path / "rows.jsonl")
    name, cache = str(tmp_path / "verifier"), str(tmp_path / "cache")
    data = MedusaDataModule(verifier=name, train=rows, validation=rows, cache_dir=cache)
    module = MedusaModule(verifier=name, heads=HEADS)
    trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, default_root_dir=tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = MedusaModule.load_from_checkpoint(tmp_path / "mine.ckpt")
    own = module.draft.state_dict()
    assert loaded.heads == HEADS
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.draft.state_dict().items())


def test_the_package_registers_itself_without_a_fault() -> None:
    [plugin] = [candidate for candidate in installed().plugins if candidate.name == "medusa"]
    assert plugin.package == "specforge-medusa" and not plugin.faults
