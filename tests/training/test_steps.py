from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge.documents import DocumentLayout
from specforge.models.draft_rows import DraftRows
from specforge.training.losses.distillation import DraftSteps
from specforge.training.module import DraftModule
from specforge.training.steps import prepare_steps
from specforge.verifier.parts import VerifierParts
from specforge_dflash.dflash2_module import DFlash2Module
from specforge_dflash.settings import DFlash2DraftSettings
from specforge_eagle.module import EagleModule
from specforge_eagle3.module import Eagle3DraftSettings, Eagle3Module
from specforge_mlp.module import MLPModule
from specforge_peagle.module import PEagleDraftSettings, PEagleModule

STEPS = 3
MODULES = {
    "eagle3": partial(Eagle3Module, draft=Eagle3DraftSettings(num_layers=2, draft_vocab_size=40), ttt_steps=STEPS),
    "hass": partial(EagleModule, noise=0.0, alignment_steps=STEPS),
    "mlp": MLPModule,
    "peagle": partial(
        PEagleModule, draft=PEagleDraftSettings(num_layers=2, draft_vocab_size=40, mask_token_id=2), depths=2
    ),
    "dflash2": partial(
        DFlash2Module,
        draft=DFlash2DraftSettings(
            num_layers=1, block_size=4, mask_token_id=0, selector_rank=4, selector_top_k=5, conv_group_size=4
        ),
    ),
}
# The last module of each algorithm before its head.
LAST: dict[str, Callable[[Any], torch.nn.Module]] = {
    "eagle3": lambda draft: draft.layers[-1].mlp,
    "hass": lambda draft: draft.transformer.mlp,
    "mlp": lambda draft: draft.ln[-1],
}
BATCH = {
    "input_ids": torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(0)),
    "loss_mask": torch.arange(16).expand(2, -1) % 7 > 1,
    "document_ids": torch.tensor([[0] * 9 + [1] * 5 + [-1] * 2, [0] * 16]),
    "position_ids": torch.tensor([[*range(9), *range(5), 0, 0], [*range(16)]]),
}


def make_module(name: str, tiny_verifiers: Mapping[str, Any]) -> DraftModule:
    made = tiny_verifiers["llama"]
    torch.manual_seed(0)
    module = MODULES[name](verifier=str(made.folder))
    parts = VerifierParts.of(made.model)
    data: Any = SimpleNamespace(vocabulary_counts=lambda: torch.arange(61, 0, -1))
    module.teacher.hold(made.model.requires_grad_(False), parts)
    module.create_draft(data)
    return module


def trained(name: str, tiny_verifiers: Mapping[str, Any], **options: bool) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of a batch, and how often linear layers ran."""
    module = make_module(name, tiny_verifiers)
    prepare_steps(module.draft, **options)
    runs: list[int] = []
    for linear in module.draft.modules():
        if isinstance(linear, torch.nn.Linear) and not options["compiled"]:  # hooks would be compiled too
            linear.register_forward_hook(lambda *_: runs.append(1))
    module.draft_steps(BATCH, module.features(BATCH)).loss.backward()
    return {key: parameter.grad for key, parameter in module.draft.named_parameters()}, len(runs)


@pytest.mark.parametrize("name", MODULES)
def test_checkpointing_runs_steps_twice_and_changes_nothing(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    plain, once = trained(name, tiny_verifiers, activation_checkpointing=False, compiled=False)
    again, repeated = trained(name, tiny_verifiers, activation_checkpointing=True, compiled=False)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[key], gradient) for key, gradient in plain.items())
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 1e-3
    assert repeated >= once + STEPS


@pytest.mark.parametrize(
    ("name", "supervision"),
    [("eagle3", "exact"), ("eagle3", "compat"), ("hass", "exact"), ("hass", "compat"), ("mlp", "responses")],
)
def test_rows_that_no_step_needs_are_not_run_and_nothing_changes(
    name: str, supervision: str, tiny_verifiers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[DraftModule, DraftSteps, list[int]]:
        module: Any = make_module(name, tiny_verifiers)
        module.supervision = supervision
        ran: list[int] = []
        LAST[name](module.draft).register_forward_pre_hook(lambda _, given: ran.append(given[0].shape[:-1].numel()))
        outcome = module.draft_steps(BATCH, module.features(BATCH))
        outcome.loss.backward()
        return module, outcome, ran

    trimmed, ours, ran = run()
    needed = DraftRows.needed(ours.supervised, DocumentLayout.of(BATCH["document_ids"])).counts
    assert ran == list(needed) and sum(needed) < ours.supervised.numel() * 0.7
    monkeypatch.setattr(DraftRows, "needed", lambda supervised, documents: DraftRows.all(*supervised.shape, documents))
    full, reference, ran = run()
    assert ran == [32] * STEPS
    torch.testing.assert_close(ours.loss, reference.loss)
    torch.testing.assert_close(ours.acceptance, reference.acceptance)
    for (key, gradient), expected in zip(trimmed.draft.named_parameters(), full.draft.parameters(), strict=True):
        torch.testing.assert_close(gradient.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_compiled_steps_have_the_same_gradients(
    name: str, checkpointing: bool, tiny_verifiers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tracing covers our code; torch's code generation would take a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, _ = trained(name, tiny_verifiers, activation_checkpointing=False, compiled=False)
    compiled, _ = trained(name, tiny_verifiers, activation_checkpointing=checkpointing, compiled=True)
    assert compiled.keys() == plain.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(compiled[key], gradient, rtol=1e-4, atol=1e-6)
