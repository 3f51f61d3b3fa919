"""The loss of a batch and its gradients against plain formulas, and its memory."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from random_verifiers import fill
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from specforge.training.losses import chunks, distillation
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.module import Eagle3DraftSettings, Eagle3Module
from specforge_mlp.module import MLPDraftSettings, MLPModule
from specforge_mlp.stage_two import StageTwoSettings

NO_DATA: Any = SimpleNamespace()


def make_module(tiny_verifiers: Mapping[str, Any], name: str = "llama", **options: Any) -> MLPModule:
    """A module in training mode, in float64."""
    folder = tiny_verifiers[name].folder
    module = MLPModule(verifier=str(folder), draft=MLPDraftSettings(**options.pop("draft", {})), **options)
    verifier = AutoModelForCausalLM.from_pretrained(folder).double().eval().requires_grad_(False)
    parts = VerifierParts.of(verifier)
    module.teacher.hold(verifier, parts)
    module.create_draft(NO_DATA)
    fill(module.draft, 4)
    module.draft.double()
    return module


def make_batch() -> dict[str, Tensor]:
    """Two rows; the first holds two documents and padding."""
    documents = [[0] * 9 + [1] * 5 + [-1] * 2, [0] * 16]
    mask = [[0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]]
    return {
        "input_ids": torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(0)),
        "loss_mask": torch.tensor(mask, dtype=torch.bool),
        "document_ids": torch.tensor(documents),
        "position_ids": torch.tensor([[*range(9), *range(5), 0, 0], [*range(16)]]),
    }


def plain_loss(module: MLPModule, batch: dict[str, Tensor], supervised_all: bool, terms: dict[str, float]) -> Tensor:
    """Row by row and document by document: the mean over rows of each head's loss, summed over the heads."""
    heads = module.num_steps
    captured = module.features(batch).last
    losses: list[list[Tensor]] = [[] for _ in range(heads)]
    for row in range(2):
        for document in batch["document_ids"][row].unique().tolist():
            if document < 0:
                continue
            indices = (batch["document_ids"][row] == document).nonzero().squeeze(1)
            x, mask = batch["input_ids"][row, indices], batch["loss_mask"][row, indices].tolist()
            output = module.teacher.model(x[None], output_hidden_states=True)
            # The states of the separate document, up to the float32 norms of transformers.
            states = module.teacher.parts.norm(captured[row, indices])
            verifier_logits = module.teacher.parts.logits(captured[row, indices])
            torch.testing.assert_close(states, output.hidden_states[-1][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(verifier_logits, output.logits[0], atol=1e-5, rtol=1e-5)
            for t in range(len(x)):
                following = x[t + 1 : t + 1 + heads]
                # At the end of a document, later heads have no token to read; their outputs are not used.
                padded = torch.cat([following, following.new_zeros(heads - len(following))])
                own = module.draft(padded[None], states[None, t : t + 1])[:, 0, 0].log_softmax(-1)
                for head in range(heads):
                    if t + 2 + head >= len(x) or not (supervised_all or all(mask[t + 1 : t + 3 + head])):
                        continue
                    log_p = verifier_logits[t + 1 + head].log_softmax(-1)
                    log_q = own[head]
                    by_name = {"text": -log_q[x[t + 2 + head]], "kl": (log_p.exp() * (log_p - log_q)).sum()}
                    losses[head].append(sum(weight * by_name[name] for name, weight in terms.items()))
    # Factors are float32 for any dtype of the draft.
    factors = module.step_decay ** torch.arange(heads) / torch.tensor([max(1, len(loss)) for loss in losses])
    return sum(
        factor * torch.stack(values).sum() for factor, values in zip(factors.double(), losses, strict=True) if values
    )


@pytest.mark.parametrize("supervision", ["responses", "all"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("name", "terms"),
    [("llama", {"text": 1.0}), ("llama", {"kl": 1.0}), ("gemma2", {"text": 0.5, "kl": 2.0})],
    ids=["text", "kl", "both, gemma2"],
)
def test_loss_and_gradients_are_the_plain_ones(
    supervision: Any, tied: bool, name: str, terms: dict[str, float], tiny_verifiers: Mapping[str, Any]
) -> None:
    draft = {"num_layers": 3, "intermediate_size": 10, "tie_weights": tied}
    module = make_module(tiny_verifiers, name, draft=draft, supervision=supervision, objective=terms, step_decay=0.9)
    batch = make_batch()
    parameters = dict(module.draft.named_parameters())
    loss = module.draft_steps(batch, module.features(batch)).loss
    ours = torch.autograd.grad(loss, list(parameters.values()))
    expected = plain_loss(module, batch, supervision == "all", terms)
    theirs = torch.autograd.grad(expected, list(parameters.values()))
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    for parameter, gradient, expected in zip(parameters, ours, theirs, strict=True):
        assert bool(expected.any()), parameter
        torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-7, msg=parameter)


def test_validation_always_counts_responses(tiny_verifiers: Mapping[str, Any]) -> None:
    batch = make_batch()
    counts = {}
    for supervision in ("responses", "all"):
        module = make_module(tiny_verifiers, supervision=supervision)
        module._trainer = SimpleNamespace(testing=False)
        module.__dict__["means"] = {"val": SimpleNamespace(sampling=distillation.Sampling())}
        for training in (True, False):
            module.train(training)
            counts[supervision, training] = int(module.draft_steps(batch, module.features(batch)).supervised.sum())
    assert counts["responses", True] == counts["responses", False] == counts["all", False] < counts["all", True]


def test_the_verifier_is_not_changed(tiny_verifiers: Mapping[str, Any]) -> None:
    module = make_module(tiny_verifiers)
    batch = make_batch()
    module.draft_steps(batch, module.features(batch)).loss.backward()
    assert all(parameter.grad is None for parameter in module.teacher.model.parameters())
    assert module.state_dict().keys() == {f"draft.{name}" for name in module.draft.state_dict()}


def test_published_settings_are_the_defaults(tiny_verifiers: Mapping[str, Any]) -> None:
    module = MLPModule(verifier=str(tiny_verifiers["llama"].folder))
    optimizer = module.optimizer_settings
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-3, (0.9, 0.95), 0.1)
    assert module.term_weights == {"text": 1.0} and module.num_steps == 3 and module.step_decay == 1
    assert module.settings.tie_weights and module.settings.scale_input and module.aux_layers == []
    stage = StageTwoSettings()
    assert (stage.prompt_length, stage.new_tokens, stage.temperature, stage.top_k) == (64, 256, 1.0, 10)


@pytest.mark.parametrize(("begin", "first"), [(0.7, 14), (0.01, 0), (1, 1), (15, 15), (15.9, 15), (0.74, 15)])
def test_where_stage_two_begins(begin: float, first: int) -> None:
    assert StageTwoSettings(begin=begin).first_step(20) == first


@pytest.mark.parametrize(
    "values", [{"begin": 0}, {"begin": -1}, {"prompt_length": 0}, {"new_tokens": 0}, {"buffer": 0}, {"top_p": 0.5}]
)
def test_wrong_settings_of_stage_two_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        StageTwoSettings(**values)


def test_text_is_an_objective_of_other_algorithms_too(tiny_verifiers: Mapping[str, Any]) -> None:
    """EAGLE-3 trained on the text's tokens, with a draft vocabulary smaller than the verifier's."""
    size, steps = 40, 2
    made = tiny_verifiers["llama"]
    torch.manual_seed(0)
    module = Eagle3Module(
        verifier=str(made.folder),
        draft=Eagle3DraftSettings(draft_vocab_size=size),
        ttt_steps=steps,
        objective={"text": 1.0},
    )
    # Frequent tokens have low ids, so that the draft vocabulary is 0..D-1.
    data: Any = SimpleNamespace(vocabulary_counts=lambda: torch.arange(61, 0, -1))
    module.teacher.hold(made.model, VerifierParts.of(made.model))
    module.create_draft(data)
    batch = make_batch()
    features = module.features(batch)
    outcome = module.draft_steps(batch, features)
    hidden = module.draft.unroll(batch["input_ids"], features, batch["position_ids"], batch["document_ids"], steps)
    x, rows = batch["input_ids"], outcome.supervised.view(steps, 2, 16)
    expected = 0.0
    for step in range(steps):
        log_q = module.draft.logits(hidden[step]).log_softmax(-1)
        losses = []
        for row, t in rows[step].nonzero().tolist():
            token = int(x[row, t + 2 + step])
            losses.append(-float(log_q[row, t, token].detach()) if token < size else 0.0)
        assert 0.0 in losses and any(losses)
        expected += module.step_decay**step * sum(losses) / len(losses)
    assert float(outcome.loss.detach()) == pytest.approx(expected, rel=1e-4)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor created."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("terms", [{"text": 1.0}, {"kl": 1.0}], ids=["text", "kl"])
def test_logits_of_all_heads_never_exist_at_once(
    tied: bool, terms: dict[str, float], tiny_verifiers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, rows, vocabulary = 3, 64, 61
    # Logits of four targets, of the verifier and every head.
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 4 * (1 + heads) * vocabulary)
    monkeypatch.setattr(chunks, "LEAST_TARGETS", 1)
    draft = {"num_layers": heads, "tie_weights": tied}
    module = make_module(tiny_verifiers, draft=draft, supervision="all", objective=terms)
    tokens = torch.randint(3, vocabulary, (2, rows // 2), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": tokens,
        "loss_mask": torch.ones_like(tokens, dtype=torch.bool),
        "document_ids": torch.zeros_like(tokens),
        "position_ids": torch.arange(rows // 2).expand(2, -1),
    }
    features = module.features(batch)
    with Largest() as largest:
        module.draft_steps(batch, features).loss.backward()
    # States of all heads and rows, or one head; logits of one head at every row would be more.
    assert largest.elements <= max(heads * rows * module.draft.config.state_size, 4 * (1 + heads) * vocabulary)
    assert largest.elements < rows * vocabulary < heads * rows * vocabulary
