r"""Only the losses and gradients of a step: ours against the plain formula, and torch's and Liger's chunked losses.

    pip install --no-deps liger-kernel triton   # optional, for its line
    python benchmarks/objective.py --output objective.json

All compute the loss from hidden states and heads, and the gradients of the draft's states and head, in float32 with
one thread, each in a separate process. `kl` is the divergence from the verifier's distribution, whose logits all
compute too; `text` is the cross-entropy with the text. Ours forms a target's distribution once for all draft steps, and
also returns acceptance probabilities and top-1 agreement, with any loss; "compiled" is with `model.compile: true`.
Liger's Triton kernels need an accelerator; its chunked Jensen-Shannon loss, at beta 0 the same divergence, is plain
torch, here without torch.compile. torch's ``linear_cross_entropy`` takes classes (or stored probabilities, which the
comparison avoids).

The losses must agree. Time is the processor's, the median of three; memory is the growth of the peak over weights and
inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from memory import growth_of_peak
from torch import Tensor, nn

from specforge.sampling import Sampling
from specforge.training.losses.distillation import Labels, Teacher, distill
from specforge.training.losses.named import objective_terms
from specforge.verifier.parts import VerifierParts

ROUNDS = 3
OURS = "ours"


class Problem:
    """Random states and heads.

    Args:
        steps: Draft steps.
        rows: Rows of each step, all supervised.
        width: Width of the states.
        vocabulary: Vocabulary size of draft and verifier.
    """

    def __init__(self, steps: int, rows: int, width: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
        config: Any = SimpleNamespace(final_logit_softcapping=None)
        parts = VerifierParts(config, nn.Embedding(1, width), nn.RMSNorm(width), head)
        self.teacher = Teacher(torch.randn(rows, width), parts, None)
        self.hidden = torch.randn(steps, rows, width, requires_grad=True)
        self.head = torch.randn(vocabulary, width).div_(width**0.5).requires_grad_()
        # Every step is compared with the same rows.
        self.targets = torch.arange(rows).expand(steps, rows)
        self.text = torch.randint(vocabulary, (rows,))

    @property
    def normalised(self) -> Tensor:
        """Input of the verifier's head, for each step and row, [S * N, H]."""
        return self.teacher.parts.norm(self.teacher.last)[self.targets.flatten()]

    @property
    def classes(self) -> Tensor:
        """The text's token of each step and row, [S * N]."""
        return self.text[self.targets.flatten()]


def ours(problem: Problem, objective: str, compiled: bool = False) -> Tensor:
    """Return the loss as training computes it."""
    steps, rows = problem.targets.shape
    return distill(
        problem.hidden,
        problem.head,
        problem.teacher,
        problem.targets,
        torch.ones_like(problem.targets, dtype=torch.bool),
        objective_terms({objective: 1.0}),
        torch.full((steps, rows), 1 / (steps * rows)),
        labels=Labels(problem.text, Sampling()),
        compiled=compiled,
    ).loss


def plain(problem: Problem, objective: str) -> Tensor:
    """Return the loss by the plain formula: logits of all steps in one tensor."""
    logits = problem.hidden.flatten(0, 1) @ problem.head.T
    if objective == "text":
        return F.cross_entropy(logits, problem.classes)
    log_p = problem.teacher.parts.lm_head(problem.normalised).log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="batchmean")


def of_torch(problem: Problem, objective: str) -> Tensor:
    """Return torch's chunked loss, new in 2.13."""
    chunks = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(problem.hidden.flatten(0, 1), problem.head, problem.classes, options=chunks)


def of_liger(problem: Problem, objective: str) -> Tensor:
    """Return Liger's chunked loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    head = problem.teacher.parts.lm_head.weight
    return loss(problem.hidden.flatten(0, 1), problem.head, problem.normalised, head, problem.classes)


CONTESTANTS: dict[str, tuple[Callable[[Problem, str], Tensor], tuple[str, ...]]] = {
    OURS: (ours, ("kl", "text")),
    "ours, compiled": (partial(ours, compiled=True), ("kl", "text")),
    "as the formula is written": (plain, ("kl", "text")),
    "torch's linear_cross_entropy": (of_torch, ("text",)),
    "Liger's chunked loss": (of_liger, ("kl",)),
}


def measure(name: str, objective: str, sizes: tuple[int, ...]) -> dict[str, float]:
    """Measure loss, seconds and bytes in this process."""
    torch.set_num_threads(1)
    function, _ = CONTESTANTS[name]
    problem = Problem(*sizes)
    losses, seconds = [], []

    def work() -> None:
        loss = function(problem, objective)
        loss.backward()
        losses.append(loss.item())
        problem.hidden.grad = problem.head.grad = None

    for _ in range(1 + ROUNDS):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return {"loss": losses[0], "seconds": statistics.median(seconds[1:]), "memory": growth_of_peak(work)}


def main() -> None:
    """Measure every combination and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="Draft steps, or heads.")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024], help="Rows, all supervised.")
    parser.add_argument("--width", type=int, default=512, help="Of the states and heads.")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 32_768], help="Of draft and verifier.")
    parser.add_argument("--output", type=Path, help="JSON file for every figure.")
    arguments = parser.parse_args()
    contestants = {name: contestant for name, contestant in CONTESTANTS.items() if name in available()}
    every = []
    print("| loss | vocabulary | rows × steps | contestant | CPU | of ours | memory | of ours |")
    print("|---|---|---|---|---|---|---|---|")
    for objective, vocabulary, rows in itertools.product(("kl", "text"), arguments.vocabulary, arguments.rows):
        sizes = (arguments.steps, rows, arguments.width, vocabulary)
        found: dict[str, dict[str, float]] = {}
        for name, (_, objectives) in contestants.items():
            if objective in objectives:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found[name] = pool.apply(measure, (name, objective, sizes))
        own = found[OURS]
        for name, cost in found.items():
            if not math.isclose(cost["loss"], own["loss"], rel_tol=1e-4):
                sys.exit(f"{name} computes {cost['loss']}, ours {own['loss']}")
            print(
                f"| {objective} | {vocabulary:,} | {rows:,} × {arguments.steps} | {name} | {cost['seconds']:.2f} s | "
                f"{cost['seconds'] / own['seconds']:.2f} | {cost['memory'] / 2**20:,.0f} MiB | "
                f"{cost['memory'] / own['memory']:.2f} |",
                flush=True,
            )
            every.append({"objective": objective, "sizes": sizes, "contestant": name, **cost})
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(every, indent=1))


def available() -> list[str]:
    """Return the contestants available in this environment."""
    missing = set()
    if not hasattr(F, "linear_cross_entropy"):
        missing.add("torch's linear_cross_entropy")
    if importlib.util.find_spec("liger_kernel") is None:
        missing.add("Liger's chunked loss")
    return [name for name in CONTESTANTS if name not in missing]


if __name__ == "__main__":
    main()
