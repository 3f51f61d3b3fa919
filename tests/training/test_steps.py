from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge.training.module import DraftModule
from specforge.training.steps import prepare_steps
from specforge.verifier.parts import VerifierParts
from specforge_eagle.module import EagleModule
from specforge_eagle3.module import Eagle3DraftSettings, Eagle3Module
from specforge_mlp.module import MLPModule

STEPS = 3
MODULES = {
    "eagle3": partial(Eagle3Module, draft=Eagle3DraftSettings(num_layers=2, draft_vocab_size=40), ttt_steps=STEPS),
    "hass": partial(EagleModule, noise=0.0, alignment_steps=STEPS),
    "mlp": MLPModule,
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
    module.take_verifier(made.model, parts, data)
    return module


def trained(name: str, tiny_verifiers: Mapping[str, Any], **options: bool) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of a batch, and how often linear layers ran."""
    module = make_module(name, tiny_verifiers)
    prepare_steps(module.draft, **options)
    runs: list[int] = []
    for linear in module.draft.modules():
        if isinstance(linear, torch.nn.Linear) and not options["compiled"]:  # a hook would be compiled as well
            linear.register_forward_hook(lambda *_: runs.append(1))
    module.draft_steps(BATCH, module.features(BATCH)).loss.backward()
    return {one: parameter.grad for one, parameter in module.draft.named_parameters()}, len(runs)


@pytest.mark.parametrize("name", MODULES)
def test_checkpointing_runs_steps_twice_and_changes_nothing(name: str, tiny_verifiers: Mapping[str, Any]) -> None:
    plain, once = trained(name, tiny_verifiers, activation_checkpointing=False, compiled=False)
    again, twice = trained(name, tiny_verifiers, activation_checkpointing=True, compiled=False)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[one], gradient) for one, gradient in plain.items())
    assert max(float(one.abs().max()) for one in plain.values()) > 1e-3
    assert twice >= once + STEPS


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_compiled_steps_have_the_same_gradients(
    name: str, checkpointing: bool, tiny_verifiers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is traced is ours, the code that is generated from it is torch's and takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, _ = trained(name, tiny_verifiers, activation_checkpointing=False, compiled=False)
    compiled, _ = trained(name, tiny_verifiers, activation_checkpointing=checkpointing, compiled=True)
    assert compiled.keys() == plain.keys()
    for one, gradient in plain.items():
        torch.testing.assert_close(compiled[one], gradient, rtol=1e-4, atol=1e-6)
