"""The losses of EAGLE-1 and HASS against plain formulas, the noise, and complete runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from eagle_drafts import chain_of_all
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import smooth_l1_loss

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.decoding.loop import Decoder
from specforge.proposals import GreedyTokenProposalConfig
from specforge.training.losses.objectives import Distributions
from specforge.verifier.parts import VerifierParts
from specforge_eagle.module import EagleModule
from specforge_eagle.noise import feature_noise
from specforge_eagle.objectives import top_k_distillation

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart"
VERIFIER = QUICKSTART / "verifier"


def make_module(tiny_verifiers, name="llama", **options) -> EagleModule:
    made = tiny_verifiers[name]
    torch.manual_seed(0)
    module = EagleModule(verifier=str(made.folder), noise=0.0, **options)
    parts = VerifierParts.from_pretrained(str(made.folder))
    module.teacher.hold(made.model, parts)
    module.create_draft(SimpleNamespace())
    return module


def make_batch() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(3, 61, (1, 16), generator=torch.Generator().manual_seed(0)),
        "loss_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool),
        "document_ids": torch.tensor([[0] * 9 + [1] * 5 + [-1] * 2]),
        "position_ids": torch.tensor([[*range(9), *range(5), 0, 0]]),
    }


def plain_loss(module: EagleModule, batch: dict[str, torch.Tensor], compat: bool) -> float:
    """Row by row, each document separately: 1.0 Smooth-L1 + 0.1 cross-entropy + 1.0 top-10, averaged over rows."""
    steps = module.alignment_steps
    sums, counts = [0.0] * steps, [0] * steps
    for document in (0, 1):
        indices = (batch["document_ids"][0] == document).nonzero().squeeze(1)
        x, mask = batch["input_ids"][0, indices], batch["loss_mask"][0, indices].tolist()
        with torch.no_grad():
            output = module.teacher.model(x[None], output_hidden_states=True)
            # transformers' last hidden state is after the final norm, as EAGLE-1 reads it.
            features = output.hidden_states[-1]
            positions = torch.arange(len(x))[None]
            documents = torch.zeros_like(positions)
            predicted = chain_of_all(module.draft, x[None], features, positions, documents, steps=steps)[:, 0]
        for step in range(steps):
            for t in range(len(x) - 1 - step):
                response = [mask[t + step]] if compat else mask[t + 1 : t + 3 + step]
                if not all(response) or len(response) < (1 if compat else 2 + step):
                    continue
                counts[step] += 1
                own, true = predicted[step, t], features[0, t + 1 + step]
                p = output.logits[0, t + 1 + step].double().softmax(-1)
                log_q = module.teacher.model.lm_head(own).double().log_softmax(-1)
                if cap := getattr(module.teacher.model.config, "final_logit_softcapping", None):
                    log_q = (torch.tanh(module.teacher.model.lm_head(own).double() / cap) * cap).log_softmax(-1)
                best = p.topk(10).indices
                sums[step] += float(smooth_l1_loss(own, true))
                sums[step] += 0.1 * float(-(p * log_q).sum()) + float(-(p[best] * log_q[best]).sum())
    return sum(total / max(1, count) for total, count in zip(sums, counts, strict=True))


@pytest.mark.parametrize("supervision", ["exact", "compat"])
@pytest.mark.parametrize(("verifier", "steps"), [("llama", 1), ("llama", 3), ("qwen3", 3), ("gemma2", 2)])
def test_the_loss_of_a_packed_batch(supervision: Any, verifier, steps, tiny_verifiers):
    objective = {"cross_entropy": 0.1, "top_k": 1.0}
    module = make_module(tiny_verifiers, verifier, alignment_steps=steps, supervision=supervision, objective=objective)
    batch = make_batch()
    outcome = module.draft_steps(batch, module.features(batch))
    expected = plain_loss(module, batch, supervision == "compat")
    assert float(outcome.loss) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1


def test_every_weight_of_the_draft_gets_a_gradient_and_no_other(tiny_verifiers):
    module = make_module(tiny_verifiers, alignment_steps=3)
    batch = make_batch()
    module.draft_steps(batch, module.features(batch)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.draft.parameters())
    assert all(parameter.grad is None for parameter in module.teacher.model.parameters())
    assert not any("embed_tokens" in name or "lm_head" in name for name in module.state_dict())


def test_top_k_does_not_renormalise():
    log_p, log_q = (torch.randn(4, 15, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    expected = []
    for p, q in zip(log_p.exp(), log_q, strict=True):
        best = sorted(range(15), key=lambda token: -p[token])[:10]
        expected.append(-sum(float(p[token] * q[token]) for token in best))
    found = top_k_distillation(Distributions(log_q, log_p, log_p))
    assert found.tolist() == pytest.approx(expected)
    few = Distributions(log_q[:, :4], log_p[:, :4], log_p[:, :4])
    assert torch.allclose(top_k_distillation(few), -(log_p[:, :4].exp() * log_q[:, :4]).sum(-1))


def test_noise_is_bounded_by_the_documents_length_and_repeatable():
    documents = torch.tensor([[0] * 8 + [1] * 64 + [-1] * 3])
    features = torch.zeros(1, 75, 50)
    noise = feature_noise(features, documents, 0.1, seed=7)
    for begin, end in ((0, 8), (8, 72)):
        bound = 0.1 * 512 / (end - begin)
        part = noise[0, begin:end]
        assert 0.9 * bound < float(part.abs().max()) <= bound and abs(float(part.mean())) < 0.1 * bound
    assert torch.equal(noise, feature_noise(features, documents, 0.1, seed=7))
    assert not torch.equal(noise, feature_noise(features, documents, 0.1, seed=8))
    half = feature_noise(features.bfloat16(), documents, 0.1, seed=7)
    assert half.dtype == torch.bfloat16


@pytest.fixture(scope="module", params=["EAGLE-1", "HASS"])
def run(request, tmp_path_factory):
    """A short run on the quickstart, and its configuration."""
    folder = tmp_path_factory.mktemp("runs")
    for name, number in (("train", 40), ("validation", 8)):
        lines = (QUICKSTART / f"{name}.jsonl").read_text().splitlines()[:number]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    model: dict[str, Any] = {"optimizer": {"lr": 1e-2}, "schedule": {"warmup": 2}, "measured_steps": 4}
    if request.param == "HASS":
        model |= {"alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0}}
    values = {
        "algorithm": "eagle",
        "verifier": str(VERIFIER),
        "output_dir": str(folder / "runs"),
        "trainer": {"accelerator": "cpu", "max_steps": 16, "max_epochs": 9, "log_every_n_steps": 1},
        "model": model,
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "max_length": 256,
            "batch_size": 2,
            "cache_dir": str(folder / "cache"),
        },
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["fit", "--config", str(config)]) == 0
    return folder / "runs" / "version_0", config


def scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [scalar.value for scalar in events.Scalars(tag)]


def test_a_run_learns(run):
    losses = scalars(run[0], "train/loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert scalars(run[0], "train/feature/step_0") and scalars(run[0], "val/cross_entropy/step_0")


def test_the_acceptance_length_is_that_of_real_decoding(run):
    draft = SpeculatorModel.from_pretrained(run[0] / "draft", verifier=str(VERIFIER))
    rows = [json.loads(line) for line in (run[1].parent / "validation.jsonl").read_text().splitlines()]
    prompts = [torch.tensor(row["input_ids"][: row["loss_mask"].index(1)]) for row in rows]
    decoder = Decoder(draft.verifier, draft, GreedyTokenProposalConfig(speculative_tokens=4))
    rounds, texts = [], [[] for _ in prompts]
    for emission in decoder.decode(prompts, 96):
        texts[emission.sequence] += emission.tokens
        rounds += [emission] if emission.drafted is not None else []
    assert [prompt.tolist() + new for prompt, new in zip(prompts, texts, strict=True)] == [
        row["input_ids"] for row in rows
    ]
    measured = sum(len(emission.tokens) for emission in rounds) / len(rounds)
    assert measured == pytest.approx(max(scalars(run[0], "val/acceptance_length")), rel=1e-5)


def test_the_checkpoint_holds_the_layout_of_speculators(run):
    stored = json.loads((run[0] / "draft" / "config.json").read_text())
    assert stored["speculators_model_type"] == stored["speculators_config"]["algorithm"] == "eagle"
    assert "model_type" not in stored and stored["layernorms"] is False and stored["fusion_bias"] is False


def test_measuring_and_resuming_work(run, capfd):
    assert main(["validate", "--config", str(run[1])]) == 0
    assert "val/acceptance_length" in capfd.readouterr().out
    assert main(["fit", "--config", str(run[1]), "--ckpt_path", "last", "--trainer.max_steps=18"]) == 0
    assert len(scalars(run[0], "train/loss")) == 18


def test_a_second_stage_starts_from_the_first_one(run, tmp_path):
    words = ["--model.init_from", str(run[0] / "draft"), "--output_dir", str(tmp_path), "--trainer.max_steps=2"]
    assert main(["fit", "--config", str(run[1]), *words, "--model.optimizer.lr=1e-9"]) == 0
    first = min(scalars(run[0], "train/loss")[:2])
    assert max(scalars(tmp_path / "version_0", "train/loss")) < first
