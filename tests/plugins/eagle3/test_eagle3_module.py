from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from specforge.errors import UsageError
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.module import Eagle3DraftSettings, Eagle3Module

# Frequent tokens have low ids, so that the draft vocabulary is 0..D-1.
DATA: Any = SimpleNamespace(vocabulary_counts=lambda: torch.arange(61, 0, -1))


def make_module(tiny_verifiers: Mapping[str, Any], size: int | None, **options: Any) -> Eagle3Module:
    made = tiny_verifiers["llama"]
    torch.manual_seed(0)
    settings = Eagle3DraftSettings(draft_vocab_size=size, **options.pop("draft", {}))
    module = Eagle3Module(verifier=str(made.folder), draft=settings, **options)
    parts = VerifierParts.from_pretrained(str(made.folder))
    module.teacher.hold(made.model, parts)
    module.create_draft(DATA)
    return module


def make_batch() -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, 61, (1, 16), generator=torch.Generator().manual_seed(0)),
        "loss_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool),
        "document_ids": torch.tensor([[0] * 9 + [1] * 5 + [-1] * 2]),
        "position_ids": torch.tensor([[*range(9), *range(5), 0, 0]]),
    }


def reference_loss(module: Eagle3Module, batch: dict[str, Tensor], size: int, compat: bool) -> float:
    """Row by row: 0.8^k times the mean over rows of KL(p || q), document by document."""
    model, steps = module.teacher.model, module.num_steps
    sums, counts = [0.0] * steps, [0] * steps
    for document in (0, 1):
        indices = (batch["document_ids"][0] == document).nonzero().squeeze(1)
        x, mask = batch["input_ids"][0, indices], batch["loss_mask"][0, indices].tolist()
        with torch.no_grad():
            output = model(x[None], output_hidden_states=True)
            aux = torch.stack([output.hidden_states[layer] for layer in module.aux_layers], dim=2)
            positions = torch.arange(len(x))[None]
            hidden = module.draft(x[None], aux, positions, torch.zeros_like(positions), steps=steps)
        for step in range(steps):
            for t in range(len(x) - 1 - step):
                response = [mask[t + step]] if compat else mask[t + 1 : t + 3 + step]
                if not all(response) or len(response) < (1 if compat else 2 + step):
                    continue
                counts[step] += 1
                logits = output.logits[0, t + 1 + step].double()
                if compat and int(logits.argmax()) >= size:
                    continue
                log_p = logits[:size].log_softmax(-1)
                log_q = module.draft.lm_head(hidden[step, 0, t]).double().log_softmax(-1)
                sums[step] += float((log_p.exp() * (log_p - log_q)).sum())
    return sum(0.8**step * total / max(1, count) for step, (total, count) in enumerate(zip(sums, counts, strict=True)))


@pytest.mark.parametrize("supervision", ["exact", "compat"])
@pytest.mark.parametrize("size", [None, 20])
def test_the_loss_of_a_packed_batch(supervision: Any, size: int | None, tiny_verifiers: Mapping[str, Any]) -> None:
    module = make_module(tiny_verifiers, size, ttt_steps=4, supervision=supervision)
    batch = make_batch()
    outcome = module.draft_steps(batch, module.features(batch))
    expected = reference_loss(module, batch, size or 61, supervision == "compat")
    assert float(outcome.loss) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1
    outcome.loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.draft.parameters()
    )
    assert not any(parameter.requires_grad for parameter in module.teacher.parts.lm_head.parameters())


def test_denominators(tiny_verifiers: Mapping[str, Any]) -> None:
    supervised = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * 4])
    valid = make_module(tiny_verifiers, None, step_decay=0.5)
    assert valid.step_weights(supervised).tolist() == pytest.approx([1 / 3, 0.5, 0.25])
    every = make_module(tiny_verifiers, None, step_decay=0.5, denominator="all")
    assert every.step_weights(supervised).tolist() == pytest.approx([0.25, 0.125, 0.0625])


def test_settings_reach_the_draft(tiny_verifiers: Mapping[str, Any]) -> None:
    module = make_module(
        tiny_verifiers,
        20,
        ttt_steps=5,
        draft={"train_head": False, "train_embeddings": True, "num_layers": 2, "layer_type": "qwen3", "fc_norm": True},
    )
    draft, verifier = module.draft, module.teacher.model
    assert module.num_steps == 5 and module.aux_layers == [2, 4, 5]
    assert draft.draft_ids.tolist() == list(range(20))
    assert not draft.lm_head.weight.requires_grad
    assert torch.equal(draft.lm_head.weight, verifier.lm_head.weight[:20])
    assert draft.embed_tokens.weight.requires_grad
    assert torch.equal(draft.embed_tokens.weight, verifier.model.embed_tokens.weight)
    assert len(draft.layers) == 2 and draft.fc_norm is not None
    assert draft.config.speculators_config.verifier.name_or_path == module.teacher.name
    names = module.state_dict().keys()
    assert names == {f"draft.{name}" for name in draft.state_dict()}


def test_impossible_settings_are_refused(tiny_verifiers: Mapping[str, Any]) -> None:
    folder = str(tiny_verifiers["llama"].folder)

    def build(**draft: Any) -> Eagle3Module:
        return Eagle3Module(verifier=folder, draft=Eagle3DraftSettings(**{"draft_vocab_size": None, **draft}))

    for wrong, message in [
        ({"aux_layers": [1, 9]}, r"model\.draft\.aux_layers.*0\.\.8"),
        ({"aux_layers": [3, 1]}, r"model\.draft\.aux_layers.*ascending"),
        ({"draft_vocab_size": 62}, r"model\.draft\.draft_vocab_size is 62"),
        ({"draft_vocab_size": 32000}, r"only 61 tokens"),
    ]:
        with pytest.raises(UsageError, match=message):
            build(**wrong)
    assert build(aux_layers=[0, 8]).aux_layers == [0, 8]
    for wrong in ({"norm_before_fc": True, "fc_norm": True}, {"num_layers": 0}, {"layer_type": "gpt"}, {"widht": 1}):
        with pytest.raises(ValidationError):
            Eagle3DraftSettings(**wrong)


def test_an_empty_list_of_aux_layers_is_refused(tiny_verifiers: Mapping[str, Any]) -> None:
    settings = Eagle3DraftSettings(draft_vocab_size=None, aux_layers=[])
    with pytest.raises(UsageError, match="aux_layers"):
        Eagle3Module(verifier=str(tiny_verifiers["llama"].folder), draft=settings)
