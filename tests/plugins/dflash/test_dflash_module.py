"""Training block drafters: the weights of slots, the trained parameters, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from specforge.errors import UsageError
from specforge.models.chain.alignment import align
from specforge.sampling import Sampling
from specforge.training.mask_token import unused_token
from specforge.training.module import DraftModule
from specforge.verifier.parts import VerifierParts
from specforge_dflash.config import DFlash2SpeculatorConfig, DFlashSpeculatorConfig, DSparkSpeculatorConfig
from specforge_dflash.dflash2_module import DFlash2Module
from specforge_dflash.dspark_module import DSparkModule
from specforge_dflash.module import DFlashModule
from specforge_dflash.settings import DFlash2DraftSettings, DFlashDraftSettings, DSparkDraftSettings

VOCABULARY, MASK = 61, 60
SMALL: dict[str, Any] = {"num_layers": 2, "aux_layers": [1, 4, 7], "mask_token_id": MASK}
MODULES: dict[str, tuple[type[DraftModule], Any]] = {
    "dflash": (DFlashModule, DFlashDraftSettings(block_size=4, **SMALL)),
    "dflash, pruned": (DFlashModule, DFlashDraftSettings(block_size=4, draft_vocab_size=40, **SMALL)),
    "dflash2": (
        DFlash2Module,
        DFlash2DraftSettings(block_size=4, selector_rank=4, selector_top_k=5, conv_group_size=4, **SMALL),
    ),
    "dspark": (DSparkModule, DSparkDraftSettings(block_size=3, markov_rank=4, **SMALL)),
    "dspark, rnn": (DSparkModule, DSparkDraftSettings(block_size=3, markov_rank=4, markov_head_type="rnn", **SMALL)),
}
BATCH = {
    "input_ids": torch.randint(3, MASK, (2, 16), generator=torch.Generator().manual_seed(0)),
    "loss_mask": torch.arange(16).expand(2, -1) % 9 > 1,
    "document_ids": torch.tensor([[0] * 9 + [1] * 5 + [-1] * 2, [0] * 16]),
    "position_ids": torch.tensor([[*range(9), *range(5), 0, 0], [*range(16)]]),
}


class Rows:
    """Rows that hold each of the tokens 3 .. 59 once; a response has seven of them."""

    longest_response = 7
    token_counts = torch.bincount(torch.arange(3, MASK), minlength=VOCABULARY)


def data_of(rows: Any = Rows, tokens: int = VOCABULARY - 1) -> Any:
    return SimpleNamespace(
        vocabulary_counts=lambda: torch.arange(VOCABULARY, 0, -1),
        vocabulary_size=VOCABULARY,
        train_rows=rows,
        validation_rows=None,
        test_rows=None,
        verifier="tiny",
        tokenizer=SimpleNamespace(get_vocab=lambda: {str(token): token for token in range(tokens)}),
    )


def make_module(name: str, tiny_verifiers: Mapping[str, Any], **options: Any) -> Any:
    made, (module_class, settings) = tiny_verifiers["llama"], MODULES[name]
    torch.manual_seed(0)
    module = module_class(verifier=str(made.folder), draft=options.pop("draft", settings), **options)
    module.teacher.hold(made.model.requires_grad_(False), VerifierParts.of(made.model))
    module.create_draft(data_of())
    return module


@pytest.mark.parametrize("name", MODULES)
def test_all_of_the_draft_is_trained_and_nothing_of_the_verifier(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    module = make_module(name, tiny_verifiers)
    module.draft_steps(BATCH, module.features(BATCH)).loss.backward()
    for key, parameter in module.draft.named_parameters():
        is_trained = parameter.grad is not None and bool(parameter.grad.any())
        # Convolutions start as the identity, so the readers of the second tap get no gradient yet.
        assert is_trained == (key != "lm_head.weight"), key
    head = module.teacher.parts.lm_head.weight
    assert head.grad is None and (module.draft.draft_ids is not None or module.draft.head_weights is not None)


@pytest.mark.parametrize("name", MODULES)
def test_slots_share_one_denominator(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    module = make_module(name, tiny_verifiers, anchors=None, step_decay=0.5)
    supervised = module.alignment(BATCH).supervised.flatten(1)
    weights = module.pair_weights(supervised)
    decay = 0.5 ** torch.arange(3)
    total = float((decay[:, None] * supervised).sum())
    torch.testing.assert_close(weights, (decay / total)[:, None].expand_as(supervised))
    outcome = module.draft_steps(BATCH, module.features(BATCH))
    expected = sum(
        weight * float((weights[:, 0] * outcome.terms[term]).sum()) for term, weight in module.term_weights.items()
    )
    assert float(outcome.loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_a_batch_without_a_response_has_zero_gradients(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    """Other processes wait for a gradient of each weight, so none may be missing."""
    module = make_module(name, tiny_verifiers)
    batch = {**BATCH, "loss_mask": torch.zeros_like(BATCH["loss_mask"])}
    loss = module.draft_steps(batch, module.features(batch)).loss
    loss.backward()
    assert float(loss) == 0
    for key, parameter in module.draft.named_parameters():
        assert key == "lm_head.weight" or (parameter.grad is not None and not bool(parameter.grad.any())), key


def test_anchors_are_drawn_in_training_and_all_rows_are_in_validation(tiny_verifiers: Mapping[str, Any]) -> None:
    module = make_module("dflash", tiny_verifiers, anchors=2)
    every = align(BATCH["loss_mask"], BATCH["document_ids"], 3).supervised
    torch.manual_seed(1)
    first = module.alignment(BATCH).supervised
    assert torch.equal(module.alignment(BATCH).supervised, first)
    drawn = first[0]
    assert not bool((first & ~every).any()) and torch.equal(first, every & drawn)
    documents = BATCH["document_ids"] + torch.tensor([[0], [2]])
    assert [int(drawn[documents == number].sum()) for number in (0, 1, 2)] == [2, 2, 2]
    torch.manual_seed(2)
    assert not torch.equal(module.alignment(BATCH).supervised, first)
    module.eval()
    assert torch.equal(module.alignment(BATCH).supervised, every)


def test_accumulated_batches_draw_the_anchors_of_one_large_batch(tiny_verifiers: Mapping[str, Any]) -> None:
    module = make_module("dflash", tiny_verifiers, anchors=2)
    at_once = module.alignment(BATCH).supervised
    parts = [module.alignment({name: tensor[row : row + 1] for name, tensor in BATCH.items()}) for row in (0, 1)]
    assert torch.equal(torch.cat([part.supervised for part in parts], dim=1), at_once)


def test_validation_measures_the_selectors_choice(tiny_verifiers: Mapping[str, Any]) -> None:
    module: Any = make_module("dflash2", tiny_verifiers)
    module.eval()
    module.means = {"val": SimpleNamespace(sampling=Sampling(temperature=1.0))}
    module._trainer = SimpleNamespace(testing=False, global_step=0)
    features = module.features(BATCH)
    with torch.no_grad():
        outcome = module.draft_steps(BATCH, features)
        steps = module.num_steps
        hidden = module.draft.unroll(
            BATCH["input_ids"], features, BATCH["position_ids"], BATCH["document_ids"], steps
        ).flatten(1, 2)
        targets = module.alignment(BATCH).targets.flatten(1)
        p = module.teacher.parts.logits(features.last.flatten(0, 1))[targets].softmax(-1)
        q = torch.stack([module.draft.logits(hidden[step], step) for step in range(steps)]).softmax(-1)
    counted = outcome.supervised
    torch.testing.assert_close(outcome.acceptance, torch.minimum(p, q).sum(-1) * counted)
    assert torch.equal(outcome.agreement, (p.argmax(-1) == q.argmax(-1)) * counted.float())
    text = BATCH["input_ids"].flatten().roll(-1)[targets]
    assert torch.equal(outcome.matches, (q.argmax(-1) == text) * counted.float())
    chances = (q.gather(-1, text[..., None]) / p.gather(-1, text[..., None]))[..., 0].clamp(max=1)
    torch.testing.assert_close(outcome.drawn, chances * counted)


@pytest.mark.parametrize("weighting", ["dpace", "vat"])
def test_a_weighting_weighs_the_selector_by_its_own_chain(weighting: str, tiny_verifiers: Mapping[str, Any]) -> None:
    plain, weighted = (
        make_module("dflash2", tiny_verifiers, weighting=name, step_decay=1.0) for name in (None, weighting)
    )
    features = plain.features(BATCH)
    losses = [module.draft_steps(BATCH, features).terms["selector"] for module in (plain, weighted)]
    assert not torch.equal(*losses) and bool((losses[1] > 0).all())


class TestRefusals:
    def test_a_block_longer_than_any_response(self, tiny_verifiers: Mapping[str, Any]) -> None:
        settings = DFlashDraftSettings(block_size=8, **SMALL)
        module = make_module("dflash", tiny_verifiers, draft=settings)
        with pytest.raises(UsageError, match="block_size is 8, so that a block proposes 7 tokens, but the longest re"):
            module.check_texts(data_of())
        shorter = settings.model_copy(update={"block_size": 7})
        make_module("dflash", tiny_verifiers, draft=shorter).check_texts(data_of())

    def test_a_mask_token_outside_the_table(self, tiny_verifiers: Mapping[str, Any]) -> None:
        with pytest.raises(UsageError, match="mask_token_id is 61, but the verifier has ids 0 to 60"):
            make_module("dflash", tiny_verifiers, draft=DFlashDraftSettings(**{**SMALL, "mask_token_id": 61}))

    def test_a_mask_token_that_occurs_in_the_texts(self) -> None:
        with pytest.raises(UsageError, match="mask_token_id is 5, which the texts hold 1 times"):
            unused_token(5, data_of())

    def test_a_verifier_without_a_free_token(self) -> None:
        assert unused_token(None, data_of()) == MASK
        with pytest.raises(UsageError, match="tiny has no free token: its tokenizer uses all of its 61 ids; set model"):
            unused_token(None, data_of(tokens=VOCABULARY))

    def test_layers_that_the_verifier_does_not_have(self, tiny_verifiers: Mapping[str, Any]) -> None:
        settings = DFlashDraftSettings(aux_layers=[1, 9])
        with pytest.raises(UsageError, match=r"model.draft.aux_layers: aux layers \[1, 9\] must be ascending ids in"):
            DFlashModule(verifier=str(tiny_verifiers["llama"].folder), draft=settings)

    @pytest.mark.parametrize(
        ("config", "values", "message"),
        [
            (DFlashSpeculatorConfig, {"mask_token_id": 200_000}, "outside the verifier's table"),
            (DFlashSpeculatorConfig, {"block_size": 1}, "a block proposes nothing"),
            (DFlashSpeculatorConfig, {"aux_hidden_state_layer_ids": [4, 2]}, "must be ascending"),
            (DFlashSpeculatorConfig, {"transformer_layer_config": {"model_type": "llama"}}, "block drafts have qwen3"),
            (DFlash2SpeculatorConfig, {"conv_kernel_size": 9, "draft_vocab_size": 151936}, "exceeds block_size"),
            (DFlash2SpeculatorConfig, {"conv_group_size": 7, "draft_vocab_size": 151936}, "does not divide"),
            (DFlash2SpeculatorConfig, {"draft_vocab_size": 9}, "has no draft vocabulary"),
            (DSparkSpeculatorConfig, {"markov_head_type": "rnn", "sample_from_anchor": False}, "begins at the anchor"),
        ],
    )
    def test_configurations_that_fit_no_network(self, config: Any, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            config(**{"mask_token_id": 5, **values})


def test_gradients_of_the_selector_do_not_depend_on_the_number_of_pairs_at_a_time(
    tiny_verifiers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> list[Tensor]:
        module = make_module("dflash2", tiny_verifiers)
        module.draft_steps(BATCH, module.features(BATCH)).loss.backward()
        return [parameter.grad for parameter in module.draft.parameters()]

    at_once = gradients()
    monkeypatch.setattr("specforge_dflash.dflash2.PAIRS_AT_ONCE", 4)
    for gradient, expected in zip(gradients(), at_once, strict=True):
        torch.testing.assert_close(gradient, expected)
