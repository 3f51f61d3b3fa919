r"""A training step of every algorithm: time, memory and operations, by length, draft steps and vocabulary.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --output step.json --plot step.svg

Each figure is of a separate process with one thread, in float32. A step is that of `specforge fit` on stored states:
draft steps, losses, gradients and AdamW, of the algorithm's module. Rows hold documents of 512 tokens (or one
document), of which the last 30 % are supervised; sizes that do not vary are those of ``SHAPE``.

Time is the processor's, the median of five steps. Memory is the growth of the peak resident memory in a step, over
weights, optimizer and batch. Operations are counted by torch; their rate is divided by that of a matrix product,
measured in the same process. "Compiled" is with `model.compile: true`.

With a CUDA device, EAGLE-3 for an 8B verifier is measured on it instead, in bfloat16 with float32 weights; time is then
wall time, and memory that of the device's tensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from memory import growth_of_peak

ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "EAGLE-3": ("eagle3", {}),
    "EAGLE-1": ("eagle", {}),
    "HASS": ("eagle", {"objective": {"cross_entropy": 0.1, "top_k": 1.0}}),
    "MLP": ("mlp", {}),
}
COMPILED = "EAGLE-3, compiled"
DOCUMENT = 512
SUPERVISED = 0.3
ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """The sizes of a step.

    Attributes:
        length: Tokens of the batch's one row.
        document: Tokens of a document.
        steps: Draft steps, or heads.
        vocabulary: Vocabulary size of the verifier.
        share: Share of the vocabulary that EAGLE-3 drafts; the others draft all of it.
        width: Width of verifier and draft; the draft's MLP is 3.5 times as wide.
    """

    length: int = 2048
    document: int = DOCUMENT
    steps: int = 3
    vocabulary: int = 8192
    share: float = 0.25
    width: int = 256


SHAPE = Shape()


@dataclass(frozen=True)
class Cost:
    """The cost of a step.

    Attributes:
        seconds: Processor time, or wall time on an accelerator.
        memory: Bytes over weights, optimizer and batch.
        flops: Operations.
        share: Share of the rate of a matrix product.
    """

    seconds: float
    memory: int
    flops: int
    share: float


def series(device: str) -> Iterator[tuple[str, str, Shape]]:
    """Yield the measurements: a table's name, an algorithm and a shape."""
    if device != "cpu":
        for share, name, length in itertools.product((0.25, 1.0), ("EAGLE-3", COMPILED), (2048, 4096, 8192)):
            real = Shape(length, min(length, 2048), steps=7, vocabulary=128_000, share=share, width=4096)
            yield f"length, drafting {round(share * 128_000):,} tokens", name, real
        return
    for name in (*ALGORITHMS, COMPILED):
        steps = {"EAGLE-1": 1, "EAGLE-3": 7, COMPILED: 7}.get(name, 3)
        for length in (512, 1024, 2048, 4096, 8192):
            yield "length", name, replace(SHAPE, length=length, steps=steps)
    for length in (512, 1024, 2048, 4096, 8192):
        yield "length of one document", "EAGLE-3", replace(SHAPE, length=length, document=length, steps=7)
    for name in ("EAGLE-3", "HASS", "MLP"):
        for steps in (1, 3, 5, 7):
            yield "draft steps", name, replace(SHAPE, steps=steps)
    for name in ALGORITHMS:
        steps = 1 if name == "EAGLE-1" else 3
        for vocabulary in (1024, 8192, 32_768, 131_072):
            yield "vocabulary", name, replace(SHAPE, length=1024, vocabulary=vocabulary, steps=steps)


def measure(name: str, shape: Shape, device: str) -> Cost:
    """Measure a step in this process."""
    from torch.utils.flop_counter import FlopCounterMode

    from specforge.estimation.device import measured_flops
    from specforge.estimation.shapes import MORE_FORMULAS
    from specforge.training.optimizers import OptimizerSettings, build_optimizer

    logging.disable()
    torch.set_num_threads(1)
    on_cpu = device == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    module, batch = build(name, shape, device, dtype)
    optimizer = build_optimizer(module.draft, OptimizerSettings())
    clock = time.process_time if on_cpu else time.perf_counter

    def step() -> None:
        with torch.autocast(device, dtype, enabled=not on_cpu):
            loss = module.draft_steps(batch, module.features(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not on_cpu:
            torch.accelerator.synchronize()

    step()
    seconds = []
    for _ in range(ROUNDS):
        begin = clock()
        step()
        seconds.append(clock() - begin)
    counter = FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS)
    with counter:
        step()
    flops = counter.get_total_flops()
    rate = flops / statistics.median(seconds)
    memory = growth_of_peak(step) if on_cpu else growth_on_device(step)
    return Cost(statistics.median(seconds), memory, flops, rate / measured_flops(dtype))


def growth_on_device(step: Callable[[], None]) -> int:
    """Return the growth of the peak of a CUDA device's tensors in a step, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def build(name: str, shape: Shape, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Build an algorithm's module with random weights, and a batch of random states."""
    from lightning.pytorch import Trainer
    from torch import nn
    from transformers import LlamaConfig

    from specforge.hookspecs import Algorithm
    from specforge.registry import installed
    from specforge.verifier.parts import VerifierParts
    from specforge_eagle3.module import Eagle3DraftSettings
    from specforge_mlp.module import MLPDraftSettings

    algorithm, options = ("eagle3", {"compile": True}) if name == COMPILED else ALGORITHMS[name]
    width, vocabulary = shape.width, shape.vocabulary
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=8,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        vocab_size=vocabulary,
        max_position_embeddings=shape.length,
        architectures=["LlamaForCausalLM"],
    )
    module_class = installed().load(installed().find(Algorithm, algorithm), "module")
    settings: dict[str, Any] = {
        "eagle3": {
            "ttt_steps": shape.steps,
            "draft": Eagle3DraftSettings(draft_vocab_size=round(shape.share * vocabulary)),
        },
        "eagle": {"alignment_steps": shape.steps},
        "mlp": {"draft": MLPDraftSettings(num_layers=shape.steps)},
    }[algorithm]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        module = module_class(verifier=folder, **settings, **options)
    module.trainer = Trainer(accelerator="cpu", logger=False, max_steps=1)
    parts = VerifierParts(
        config, nn.Embedding(vocabulary, width), nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
    )
    for part in (parts.embed_tokens, parts.norm, parts.lm_head):
        part.requires_grad_(False).to(device, dtype)
    module.teacher.hold(None, parts)
    module.create_draft(SimpleNamespace(vocabulary_counts=lambda: torch.arange(vocabulary)))
    module.train().to(device)
    positions = torch.arange(shape.document).repeat(shape.length // shape.document)[None]
    batch = {
        "input_ids": torch.randint(vocabulary, (1, shape.length)),
        "loss_mask": positions >= round(shape.document * (1 - SUPERVISED)),
        "document_ids": (positions == 0).cumsum(1),
        "position_ids": positions,
        "aux": torch.randn(1, shape.length, len(module.aux_layers), width, dtype=dtype),
        "last": torch.randn(1, shape.length, width, dtype=dtype),
    }
    return module, {key: tensor.to(device) for key, tensor in batch.items()}


def attribute_of(what: str) -> str:
    """Return the size of a shape that varies in a table."""
    return "steps" if what == "draft steps" else re.split(r"\W", what)[0]


def table(what: str, costs: list[tuple[str, Shape, Cost]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    attribute = attribute_of(what)
    yield f"| algorithm | {what} | tokens/s | ms per token | memory | operations per token | share of the rate |"
    yield "|---|---|---|---|---|---|---|"
    for name, shape, cost in costs:
        yield (
            f"| {name} | {getattr(shape, attribute):,} | {shape.length / cost.seconds:,.0f} | "
            f"{cost.seconds / shape.length * 1e3:.3f} | {cost.memory / 2**20:,.0f} MiB | "
            f"{cost.flops / shape.length / 1e6:,.1f} M | {cost.share:.0%} |"
        )
    yield ""


def plot(found: dict[str, list[tuple[str, Shape, Cost]]], file: Path) -> None:
    """Draw milliseconds per token and memory against the varying size."""
    from matplotlib.figure import Figure

    from specforge.drawing import COLORS, plot_style

    with plot_style():
        figure = Figure(figsize=(11, 6), layout="constrained")
        axes = figure.subplots(2, len(found), squeeze=False)
        for column, (what, costs) in enumerate(found.items()):
            attribute = attribute_of(what)
            for color, name in zip(COLORS, (*ALGORITHMS, COMPILED), strict=False):
                own = [
                    (getattr(shape, attribute), shape, cost) for algorithm, shape, cost in costs if algorithm == name
                ]
                if not own:
                    continue
                sizes = [size for size, *_ in own]
                milliseconds = [cost.seconds / shape.length * 1e3 for _, shape, cost in own]
                axes[0, column].plot(sizes, milliseconds, "o-", color=color, label=name)
                memory = [cost.memory / 2**20 for *_, cost in own]
                axes[1, column].plot(sizes, memory, "o-", color=color, label=name)
            for row in (0, 1):
                axes[row, column].set(xlabel=what, ylim=0)
        axes[0, 0].set_ylabel("ms per token")
        axes[1, 0].set_ylabel("memory of a step, MiB")
        axes[0, 0].legend(loc="lower left")
        figure.savefig(file)


def main() -> None:
    """Measure everything, print tables, and write figures and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for every figure.")
    parser.add_argument("--plot", type=Path, help="SVG file.")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[str, Shape, Cost]]] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for what, name, shape in series(device):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.setdefault(what, []).append((name, shape, pool.apply(measure, (name, shape, device))))
    for what, costs in found.items():
        print("\n".join(table(what, costs)), flush=True)
    if arguments.output is not None:
        every = {what: [(name, asdict(shape), asdict(cost)) for name, shape, cost in of] for what, of in found.items()}
        arguments.output.write_text(json.dumps(every, indent=1))
    if arguments.plot is not None:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
