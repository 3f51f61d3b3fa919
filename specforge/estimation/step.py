"""The cost of one training step: the real step, run on tensors without values.

Nothing here depends on the arithmetic of a network. The algorithm's own module builds its draft and runs its steps on
tensors without values (``specforge.estimation.shapes``), with the trainer's precision, and so do the verifier and the
optimizer. The verifier's configuration is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from specforge.data.module import DraftDataModule
from specforge.errors import SpecforgeError
from specforge.estimation.shapes import ShapeMode
from specforge.training.losses.chunks import for_accelerator
from specforge.training.module import Batch, DraftModule
from specforge.verifier.features import assume_packs, decoder_layers
from specforge.verifier.loading import auto_class
from specforge.verifier.packed_attention import attend_by_documents
from specforge.verifier.parts import VerifierParts

VERIFIER, LAYERS, HEAD, OPTIMIZER = "verifier", "draft layers", "heads and loss", "optimizer"


@dataclass(frozen=True)
class StepMemory:
    """Bytes on a device; the first four are allocated all the time.

    Attributes:
        verifier: Weights of the verifier.
        draft: Weights of the draft, without those shared with the verifier.
        gradients: Gradients of its trained weights.
        optimizer: The optimizer's states.
        features: Captured states of the verifier.
        kept: Activations kept by the draft's steps for the backward pass.
        verifier_work: Peak of further memory in the verifier's forward pass.
        draft_work: Peak of further memory in the draft's steps and the chunks of the loss.
        peak: Peak of all memory.
        peak_stored: The same if states are read from a store: without the verifier's layers and its forward pass.
    """

    verifier: int
    draft: int
    gradients: int
    optimizer: int
    features: int
    kept: int
    verifier_work: int
    draft_work: int
    peak: int
    peak_stored: int

    @classmethod
    def largest(cls, several: Sequence[Self]) -> Self:
        """Return the maximum of each field over several batches."""
        return cls(**{one.name: max(getattr(memory, one.name) for memory in several) for one in fields(cls)})


@dataclass(frozen=True)
class StepCost:
    """The cost of one batch.

    Attributes:
        flops: Floating point operations by part of the step.
        memory: Memory in bytes.
        trained: Number of trained weights.
    """

    flops: dict[str, int]
    memory: StepMemory
    trained: int


@dataclass(frozen=True)
class SplitVerifier:
    """A verifier whose layers are split over devices, each layer being gathered on all of them while it runs.

    Attributes:
        layers: Bytes of each decoder layer.
        devices: Number of devices.
    """

    layers: Sequence[int]
    devices: int

    @property
    def gathered(self) -> int:
        """Bytes that a device receives in a forward pass."""
        return sum(self.layers) * (self.devices - 1) // self.devices

    def on_each(self, memory: StepMemory) -> StepMemory:
        """Return the memory of a device, given that with the whole verifier: two layers are gathered at a time."""
        saved = sum(self.layers) - sum(self.layers) // self.devices - 2 * max(self.layers)
        return replace(memory, verifier=memory.verifier - saved, peak=memory.peak - saved)


class DryRun:
    """A training module with verifier, draft and optimizer without values, which can run steps.

    Args:
        module: The algorithm's module from the configuration; it cannot be used afterwards.
        trainer: A trainer with the run's precision for the step to query; it runs nothing.
        verifier_dtype: Dtype of the verifier's weights.
        on_accelerator: Whether the run is for an accelerator, which computes more logits at a time than a CPU.
    """

    def __init__(
        self, module: DraftModule, trainer: Trainer, verifier_dtype: torch.dtype, on_accelerator: bool = False
    ) -> None:
        self.module = module
        self._on_accelerator = on_accelerator
        module.trainer = trainer
        self._precision: Any = trainer.strategy.precision_plugin
        self._shapes = ShapeMode()
        with self._shapes, self._precision.module_init_context():
            self._verifier = _verifier(module, verifier_dtype)
            parts = VerifierParts.of(self._verifier)
            module.compile_steps = False  # compilation does not change the counts
            module.teacher.hold(self._verifier, parts)
            module.create_draft(cast(DraftDataModule, _Uncounted(parts)))
            self._optimizer: Optimizer = module.configure_optimizers()["optimizer"]
        module.train()
        self._hook_layers()

    @property
    def verifier_layers(self) -> list[int]:
        """Bytes of each of the verifier's decoder layers."""
        return [_bytes(_weights(layer)) for layer in decoder_layers(self._verifier)]

    def run(self, batch: Batch) -> StepCost:
        """Run a step on a batch, with values only in ids and masks.

        Args:
            batch: A training batch.

        Raises:
            SpecforgeError: The verifier or the draft reads values.
        """
        token = for_accelerator.set(self._on_accelerator)
        try:
            with self._shapes:
                self._step(batch)
                # Gradients and optimizer states exist after the first step, so measure the second one.
                return self._step(batch)
        except RuntimeError as error:
            raise SpecforgeError(
                f"a step of {self.module.teacher.name} and its draft cannot be run without values: {error} Estimate "
                "with a config.json of another family with the same depth and width, or with --verifier_dtype "
                "bfloat16 if experts are the reason"
            ) from error
        finally:
            for_accelerator.reset(token)

    def _step(self, batch: Batch) -> StepCost:
        """Run one step in Lightning's order: gradients of the previous step exist until the backward pass."""
        shapes, module = self._shapes, self.module
        shapes.restart()
        before, peaks = shapes.live, []
        with self._precision.forward_context():
            with shapes.part(VERIFIER):
                features = module.features(batch)
            captured = shapes.live - before
            peaks.append(shapes.peak)
            shapes.peak = shapes.live
            with shapes.part(HEAD):
                outcome = module.draft_steps(batch, features)
        kept = shapes.live - before - captured
        peaks.append(shapes.peak)
        self._optimizer.zero_grad()
        with shapes.part(LAYERS):
            outcome.loss.backward()
        peaks.append(shapes.peak)
        del features, outcome
        with shapes.part(OPTIMIZER):
            self._optimizer.step()
        trained = [one for one in module.draft.parameters() if one.requires_grad]
        memory = StepMemory(
            verifier=_bytes(_weights(self._verifier)),
            draft=_bytes(_weights(module.draft)),
            gradients=_bytes(one.grad for one in trained if one.grad is not None),
            optimizer=_bytes(_states(self._optimizer)),
            features=captured,
            kept=kept,
            verifier_work=peaks[0] - before - captured,
            draft_work=peaks[1] - before - captured - kept,
            peak=max(*peaks, shapes.peak),
            peak_stored=max(*peaks[1:], shapes.peak) - sum(self.verifier_layers),
        )
        return StepCost(dict(shapes.flops), memory, sum(one.numel() for one in trained))

    def _hook_layers(self) -> None:
        """Count operations in the draft's modules as its layers; the rest of its steps is heads and loss."""
        open_parts: list[Any] = []

        def enter(*_: Any) -> None:
            open_parts.append(self._shapes.part(LAYERS))
            open_parts[-1].__enter__()

        def leave(*_: Any) -> None:
            open_parts.pop().__exit__(None, None, None)

        for one in self.module.draft.modules():
            one.register_forward_pre_hook(enter)
            one.register_forward_hook(leave)


class _Uncounted:
    """Data whose tokens have not been counted."""

    def __init__(self, parts: VerifierParts) -> None:
        self._size = parts.config.vocab_size

    def vocabulary_counts(self) -> Tensor:
        """Return zeros: the counts do not affect the cost."""
        return torch.zeros(self._size, dtype=torch.int64)


def _verifier(module: DraftModule, dtype: torch.dtype) -> PreTrainedModel:
    loading = module.teacher.loading
    verifier: PreTrainedModel = (auto_class(module.teacher.config) or AutoModelForCausalLM).from_config(
        module.teacher.config, dtype=dtype, trust_remote_code=loading.trust_remote_code
    )
    attend_by_documents(verifier)
    assume_packs(verifier)
    return verifier.requires_grad_(False).eval()


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _states(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(one): one.numel() * one.element_size() for one in tensors}.values())
