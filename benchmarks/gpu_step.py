r"""A training step of any algorithm on a GPU, counted without one: kernels, waits, operations, bytes and memory.

    python benchmarks/gpu_step.py                        # EAGLE-3, stored and live states, 30 and 100 % supervised
    python benchmarks/gpu_step.py --algorithms dflash mtp --features live --shares 0.3
    python benchmarks/gpu_step.py --details              # also each part, wait and operation

A step of `Trainer.fit` runs in bf16-mixed on a simulated device, whose floating point tensors have no values
(tests/accelerator): Lightning, loader, logging, clipping and optimizer are the real ones, and so are ids, masks and
indices. The second step is counted. The verifier has the sizes of Llama-3.1-8B, and a step the given number of tokens,
in documents of about 700, each supervised at its end.

The time is simulated, not measured: `Rates` in tests/accelerator/step_counts.py has the assumed times of the host and
of an H200. Real kernels reach less. A fused kernel, one operation, reads its inputs and writes its outputs once.
MFU is the operations of products and attention, divided by the time, of 790 TFLOP/s.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

for folder in ("accelerator", "support"):
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / folder))
from simulated_device import DEVICE, install, simulated  # noqa: E402
from step_counts import BACKWARD, PEAK, Counting, StepCounts  # noqa: E402

MASK = 3
"""Mask token of drafts that need one; no row holds it."""
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle3": ("eagle3", {}),
    "eagle": ("eagle", {}),
    "hass": ("eagle", {"alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0}}),
    "mlp": ("mlp", {"stage_two": None}),
    "peagle": ("peagle", {"draft": {"mask_token_id": MASK}}),
    "dflash": ("dflash", {"draft": {"mask_token_id": MASK}}),
    "dflash2": ("dflash2", {"draft": {"mask_token_id": MASK}}),
    "dspark": ("dspark", {"draft": {"mask_token_id": MASK}}),
    "mtp": ("mtp", {"draft": {"fresh": True}}),
    "draft_model": ("draft_model", {"draft": {"init_layers": [0, 16, 31]}}),
}
LLAMA = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0},
}
COUNTED = 2
"""Number of the step that is counted: the first one creates the optimizer's states."""


@dataclass(frozen=True)
class Step:
    """A step to count.

    Attributes:
        algorithm: A name of ``ALGORITHMS``.
        stored: Whether the verifier's states are stored, or it runs.
        share: Share of each document that is supervised, at its end.
        tokens: Tokens of the batch, one packed row.
        document: About the number of tokens of a document.
        verifier: Sizes of the verifier, of Llama's family.
        model: Further settings of the algorithm's module.
        compiled: Whether the draft's operations are counted as ``model.compile`` might fuse them: an estimate, since
            nothing is compiled (see tests/accelerator/fusion.py).
    """

    algorithm: str = "eagle3"
    stored: bool = True
    share: float = 0.3
    tokens: int = 8192
    document: int = 700
    verifier: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    compiled: bool = False


def document_lengths(step: Step) -> list[int]:
    """Return lengths that vary as real ones do, and together are those of the batch."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < step.tokens:
        drawn = float(torch.empty(1).log_normal_(0, 0.5, generator=generator))
        lengths.append(int(drawn * step.document * 0.88) + 16)
    lengths[-1] -= sum(lengths) - step.tokens
    return [one for one in lengths if one >= 2]


def count(step: Step) -> StepCounts:
    """Count a step. ``install`` must have been called."""
    from transformers import LlamaConfig

    from specforge.training.losses.chunks import for_accelerator

    config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **(step.verifier or LLAMA))
    with tempfile.TemporaryDirectory() as name, simulated(shapes_only=True), contextlib.ExitStack() as stack:
        folder = Path(name)
        config.save_pretrained(folder / "verifier")
        counting = Counting(("draft", f"{BACKWARD} of draft") if step.compiled else ())
        module = _module(step, folder / "verifier")
        data = _data(step, folder, module, config.vocab_size)
        _name_parts(counting, module, stack)
        # Fused losses are for CUDA devices, or the simulation of one.
        stack.callback(for_accelerator.reset, for_accelerator.set(True))
        trainer = Trainer(
            **{"accelerator": DEVICE.type, "precision": "bf16-mixed", "max_steps": COUNTED, "gradient_clip_val": 0.5},
            **{"default_root_dir": folder, "log_every_n_steps": 10, "enable_checkpointing": False},
            **{"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0},
            callbacks=[_Counted(counting), *_callbacks()],
        )
        with _quiet():
            trainer.fit(module, datamodule=data)
    return counting.counts


class _Counted(Callback):
    """Counts from the end of one step to the end of the next."""

    def __init__(self, counting: Counting) -> None:
        self.counting = counting

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.counting.enter(BACKWARD)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counting.leave()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == COUNTED - 1:
            self.counting.start(trainer.lightning_module.parameters())
        else:
            self.counting.stop()


def _callbacks() -> list[Callback]:
    from specforge.training.callbacks.progress import ProgressBar
    from specforge.training.callbacks.speed import Throughput

    return [ProgressBar(), Throughput()]


def _module(step: Step, verifier: Path) -> Any:
    """Build the algorithm's module, whose verifier and draft will be created on the device, without values."""
    from transformers import AutoModelForCausalLM

    from specforge.data.features.manifest import FeatureNeeds
    from specforge.hookspecs import Algorithm
    from specforge.registry import installed
    from specforge.verifier.features import assume_packs
    from specforge.verifier.packed_attention import attend_by_documents
    from specforge.verifier.parts import VerifierParts

    name, settings = ALGORITHMS[step.algorithm]
    module_class: Any = installed().load(installed().find(Algorithm, name), "module")
    module: Any = _built(module_class, {"verifier": str(verifier), **settings, **(step.model or {})})
    config = module.teacher.config
    layers = tuple(module.aux_layers)
    vars(module)["feature_needs"] = FeatureNeeds("", "", layers, config.num_hidden_layers, config.hidden_size, False)
    create_draft = module.create_draft

    def load(*_: Any) -> None:
        whole = not step.stored or module.runs_verifier
        own = type(config)(**{**config.to_dict(), **({} if whole else {"num_hidden_layers": 1})})
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16).requires_grad_(False).eval()
        attend_by_documents(model)
        assume_packs(model)
        module.teacher.hold(model if whole else None, VerifierParts.of(model))

    def create(data: Any) -> None:
        with torch.device(DEVICE):
            create_draft(data)

    module.teacher.load, module.create_draft = load, create
    module.adapt_draft = lambda: None  # it may read the verifier's weights
    return module


def _built(module_class: Any, settings: dict[str, Any]) -> Any:
    """Build a module from plain values, as the command does."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(module_class, "model")
    return parser.instantiate(parser.parse_object({"model": settings})).model


def _data(step: Step, folder: Path, module: Any, vocabulary: int) -> Any:
    """Write the rows and return their data module, with states of its own if they are stored."""
    from specforge.data.module import DraftDataModule

    lengths = document_lengths(step)
    with (folder / "rows.jsonl").open("w") as file:
        for length in lengths:
            ids = torch.randint(MASK + 1, vocabulary, (length,)).tolist()
            mask = [int(index >= round(length * (1 - step.share))) for index in range(length)]
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")

    class Data(DraftDataModule):
        def setup(self, stage: str | None = None) -> None:
            super().setup(stage)
            self._packed["train"].bins = [list(range(len(lengths)))] * (COUNTED + 2)

        def use_features(self, *_: Any) -> bool:
            return step.stored

        def vocabulary_counts(self) -> Tensor:
            return torch.arange(vocabulary)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            batch = super().on_before_batch_transfer(batch, dataloader_idx)
            if not step.stored:
                return batch
            shape, width = batch["input_ids"].shape, module.teacher.config.hidden_size
            aux = torch.empty(*shape, len(module.aux_layers), width, dtype=torch.bfloat16)
            return {**batch, "aux": aux, "last": torch.empty(*shape, width, dtype=torch.bfloat16)}

    return Data(
        verifier=str(folder / "verifier"),
        train=str(folder / "rows.jsonl"),
        validation_share=0.0,
        max_length=step.tokens,
        cache_dir=str(folder / "cache"),
    )


def _name_parts(counting: Counting, module: Any, stack: contextlib.ExitStack) -> None:
    from lightning.pytorch.core.module import LightningModule as Base
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector

    import specforge.training.module as training
    from specforge.models.block.attention import PackedBlocks
    from specforge.models.chain.ttt_attention import TrainingTimeStep, TrainingTimeSteps, TrainingTimeTest
    from specforge.training.callbacks.speed import Throughput

    parts = {
        "verifier": [(module.teacher, "states")],
        "draft": [(type(module), "states")],
        "attention": [
            *((TrainingTimeTest, "__init__"), (TrainingTimeStep, "attend"), (TrainingTimeSteps, "attend")),
            (PackedBlocks, "attend"),
        ],
        "loss": [(training, "distill")],
        "logging": [
            *((Base, "log"), (Base, "log_dict"), (Throughput, "on_train_batch_end")),
            *((_LoggerConnector, "on_batch_end"), (_LoggerConnector, "update_train_step_metrics")),
        ],
        "clipping": [(Precision, "clip_gradients")],
    }
    for part, methods in parts.items():
        for owner, method in methods:
            original = getattr(owner, method)
            counting.name_part(owner, method, part)
            stack.callback(setattr, owner, method, original)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def row(step: Step, counts: StepCounts) -> str:
    """Return the line of a table."""
    found = counts.simulated()
    rate = counts.all_flops / found.seconds / PEAK
    return (
        f"| {step.algorithm} | {'stored' if step.stored else 'live'}, {step.share:.0%} | "
        f"{counts.kernels.total():,} | {counts.views.total():,} | {counts.waits.total()} | "
        f"{counts.all_flops / 1e12:.1f} | {counts.bytes.total() / 1e9:.0f} | {found.host * 1e3:.0f} | "
        f"{found.busy * 1e3:.0f} | {found.seconds * 1e3:.0f} | {rate:.1%} | {counts.peak / 1e9:.1f} |"
    )


def details(counts: StepCounts) -> Iterator[str]:
    """Yield each part, the waits, and the operations that move and hold most bytes."""
    busy = counts.simulated().by_part
    yield "\n| part | kernels | views | GB | TFLOP | ms busy |\n|---|---|---|---|---|---|"
    for part in sorted(counts.kernels | counts.views):
        flops = (counts.flops[part] + counts.attention_flops[part]) / 1e12
        yield (
            f"| {part} | {counts.kernels[part]:,} | {counts.views[part]:,} | {counts.bytes[part] / 1e9:.2f} | "
            f"{flops:.2f} | {busy[part] * 1e3:.1f} |"
        )
    yield ""
    yield from (f"  {times} x {kind} in {part}: {line}" for (part, kind, line), times in counts.waits.most_common())
    for name, found, unit in (
        ("GB", counts.bytes_by_operation, 1e9),
        ("kernels", counts.kernels_by_operation, 1),
        ("GB at the peak", counts.held, 1e9),
    ):
        yield ""
        yield from (f"  {value / unit:9,.2f} {name}  {part}: {what}" for (part, what), value in found.most_common(25))
    yield ""


def main() -> None:
    """Count the requested steps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=["eagle3"], help="Default: eagle3.")
    parser.add_argument("--features", nargs="+", choices=("stored", "live"), default=["stored", "live"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 1.0], help="Supervised share of a document.")
    parser.add_argument("--tokens", type=int, default=8192, help="Tokens of a step.")
    parser.add_argument("--compiled", action="store_true", help="As model.compile might fuse the draft's operations.")
    parser.add_argument("--details", action="store_true", help="Also print parts, waits and operations.")
    arguments = parser.parse_args()
    install()
    print(
        "| algorithm | states, supervised | kernels | views | waits | TFLOP | GB | host ms | busy ms | step ms | MFU | "
        "peak GB |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for name, features, share in itertools.product(arguments.algorithms, arguments.features, arguments.shares):
        step = Step(name, features == "stored", share, arguments.tokens, compiled=arguments.compiled)
        counts = count(step)
        print(row(step, counts), flush=True)
        if arguments.details:
            print("\n".join(details(counts)), flush=True)


if __name__ == "__main__":
    main()
