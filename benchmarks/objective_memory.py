r"""Peak memory of a step's losses and gradients: in chunks, as in training, beside logits stacked over all steps.

    python benchmarks/objective_memory.py --steps 3 5 --rows 512 1024 2048

Each figure is the growth of a fresh process's peak resident memory over weights and inputs.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.sampling import Sampling
from specforge.training.distillation import Labels, Teacher, distill
from specforge.training.module import objective_terms
from specforge.verifier.parts import VerifierParts


def main() -> None:
    """Measure every combination and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5], help="Draft steps, or heads.")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048], help="Rows, all supervised.")
    parser.add_argument("--width", type=int, default=576, help="Of the states and heads.")
    parser.add_argument("--vocabulary", type=int, default=49_152, help="Of draft and verifier.")
    arguments = parser.parse_args()
    print("| steps | rows | objective | in chunks | stacked | logits of all steps |\n|---|---|---|---|---|---|")
    for steps, rows, objective in itertools.product(arguments.steps, arguments.rows, ["text", "kl"]):
        sizes = (steps, rows, arguments.width, arguments.vocabulary, objective)
        chunked, stacked = (peak_growth(function, sizes) for function in (in_chunks, all_at_once))
        logits = steps * rows * arguments.vocabulary * 4 / 2**20
        print(f"| {steps} | {rows:,} | {objective} | {chunked:,.0f} MiB | {stacked:,.0f} MiB | {logits:,.0f} MiB |")


def peak_growth(function: Any, sizes: tuple[Any, ...]) -> float:
    """Run a function in a process of its own and return by how much its peak memory grew, in MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(measure, (function, sizes)))


def measure(function: Any, sizes: tuple[Any, ...]) -> float:
    """Return the growth of this process's peak memory over a forward and a backward pass, in MiB."""
    torch.set_num_threads(1)
    steps, rows, width, vocabulary, objective = sizes
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    config: Any = SimpleNamespace(final_logit_softcapping=None)
    teacher = Teacher(
        torch.randn(rows, width), VerifierParts(config, nn.Embedding(1, width), nn.RMSNorm(width), head), None
    )
    hidden = torch.randn(steps, rows, width, requires_grad=True)
    trained = torch.randn(vocabulary, width).div_(width**0.5).requires_grad_()
    tokens = torch.randint(vocabulary, (steps, rows))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(hidden, trained, teacher, tokens, objective).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def in_chunks(hidden: Tensor, head: Tensor, teacher: Teacher, tokens: Tensor, objective: str) -> Tensor:
    """Return the loss as training computes it."""
    targets = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
    weights = torch.full((len(hidden),), 1 / hidden.shape[1])
    terms = objective_terms({objective: 1.0})
    supervised = torch.ones_like(targets, dtype=torch.bool)
    labels = Labels(tokens, Sampling())
    return distill(hidden, head, teacher, targets, supervised, terms, weights, labels=labels).loss


def all_at_once(hidden: Tensor, head: Tensor, teacher: Teacher, tokens: Tensor, objective: str) -> Tensor:
    """Return the loss as the formula is written: logits of all steps in one tensor."""
    logits = hidden @ head.T
    if objective == "text":
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    log_p = teacher.parts.lm_head(teacher.parts.norm(teacher.last)).log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), log_p.expand_as(logits), log_target=True, reduction="none").sum(-1).mean()


if __name__ == "__main__":
    main()
