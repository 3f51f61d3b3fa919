"""Metrics of draft steps, exact over batches and ranks of different size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from specforge.data.rows.reading import TokenRows
from specforge.data.text.origin import Origin, why_proxy
from specforge.decoding.replay import AcceptanceLength, Sums
from specforge.sampling import Sampling
from specforge.training.losses.distillation import DraftSteps

# Names of results in the order in which they count.
FIRST = ("acceptance_length(?!_at)", "acceptance_length_at", "accept_rate_pos", "loss$", "accept_rate_cond", "")


class StepMeans(Sums):
    """Means over supervised rows at each step: every objective, acceptance probability and top-1 agreement.

    Args:
        terms: Names of the objectives.
        steps: Number S of draft steps.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, terms: Sequence[str], steps: int) -> None:
        super().__init__()
        self.quantities = quantities(terms)
        self.add_sum("sums", len(self.quantities), steps)
        self.add_sum("counts", steps)

    def update(self, outcome: DraftSteps) -> None:
        """Add a batch."""
        self.sums += step_sums(outcome)
        self.counts += outcome.supervised.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Return ``{"<quantity>/step_<k>": mean}``; steps that no row reached are left out."""
        means = (self.sums / self.counts.clamp(min=1)).float()
        return {
            f"{quantity}/step_{step}": means[row, step]
            for row, quantity in enumerate(self.quantities)
            for step in range(means.shape[1])
            if self.counts[step] > 0
        }


class StageMetrics(nn.Module):
    """All metrics of validation or test: means by step, and the acceptance length by replay.

    Args:
        terms: Names of the objectives.
        steps: Number S of draft steps.
        rows: The rows that are measured on; None if there are none.
        verifier: Fingerprint of the verifier.
    """

    def __init__(self, terms: Sequence[str], steps: int, rows: TokenRows | None, verifier: str) -> None:
        super().__init__()
        origins: list[Origin | None] = rows.summary.origins if rows is not None else []
        self.why_proxy = why_proxy(origins, verifier)
        origin = next(iter(origins), None)
        self.sampling = Sampling() if self.why_proxy or origin is None else origin.sampling
        self.by_step = StepMeans(terms, steps)
        # Greedy chains are exact on any text of the verifier, sampled chains only on text with the same sampling.
        kinds = ("greedy",) if self.sampling.is_greedy else ("greedy", "sampled")
        self.chains = {kind: AcceptanceLength(steps) for kind in kinds}
        for kind, metric in self.chains.items():
            self.add_module(kind, metric)

    @property
    def suffix(self) -> str:
        """Suffix of inexact metrics: ``_proxy``; empty if they are exact."""
        return "_proxy" if self.why_proxy else ""

    def update(self, outcome: DraftSteps, shape: torch.Size) -> None:
        """Add a batch.

        Args:
            outcome: The draft's results.
            shape: The batch's [B, T]; ``outcome`` holds its rows flattened.
        """
        self.by_step.update(outcome)
        reachable = outcome.supervised[0].view(shape)
        for acceptance, metric in zip((outcome.matches, outcome.drawn), self.chains.values(), strict=False):
            metric.update(acceptance.unflatten(1, shape), reachable)

    def replayed(self) -> dict[str, Tensor]:
        """Return the metrics of chain decoding: ``acceptance_length``, ``accept_rate_pos_k``, ...

        Those of the longest chain have the plain names; ``acceptance_length_at_K`` are those of shorter chains. If the
        text was sampled, metrics of sampled chains follow, with ``_sampled`` in their names.
        """
        values: dict[str, float] = {}
        for kind, metric in self.chains.items():
            mark = self.suffix if kind == "greedy" else f"_{kind}{self.suffix}"
            by_chain = metric.compute()
            for chain, figures in by_chain.items():
                if chain == len(by_chain):
                    values |= {f"{name}{mark}": value for name, value in figures.items()}
                else:
                    values[f"acceptance_length_at_{chain}{mark}"] = figures["acceptance_length"]
        return {name: torch.tensor(value) for name, value in values.items()}

    def reset(self) -> None:
        """Reset all metrics."""
        self.by_step.reset()
        for metric in self.chains.values():
            metric.reset()


def results_text(figures: Mapping[str, Tensor]) -> str:
    """Return the results of a validation or test as lines: what counts first, then the rest in the given order.

    Args:
        figures: Each result by its tag, such as ``val/acceptance_length``.
    """

    def rank(tag: str) -> int:
        return next(number for number, pattern in enumerate(FIRST) if re.match(pattern, tag.partition("/")[2]))

    width = max(map(len, figures), default=0)
    return "\n".join(f"{tag:<{width}}  {float(figures[tag]):.4f}" for tag in sorted(figures, key=rank))


def quantities(terms: Iterable[str]) -> tuple[str, ...]:
    """Return the names of what ``step_sums`` sums.

    Args:
        terms: Names of the objectives.
    """
    return (*terms, "acceptance", "agreement")


def step_sums(outcome: DraftSteps) -> Tensor:
    """Return the sums over supervised rows of each objective, acceptance and agreement, [quantities, S]."""
    return torch.stack([*outcome.terms.values(), outcome.acceptance.sum(1), outcome.agreement.sum(1)])
