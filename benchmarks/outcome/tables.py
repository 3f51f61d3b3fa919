"""The tables of what was trained and measured, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from training import NAMES, Trained

from specforge.evaluation.results import Measurement, Results

# By proposal method.
SHAPES = {"greedy": "chain", "dynamic_tree": "tree"}


@dataclass(frozen=True)
class Figures:
    """A draft and its figures by replay.

    Attributes:
        trained: The draft.
        replay: By the name of a set of rows, the figures of ``specforge.decoding.replay.figures``.
    """

    trained: Trained
    replay: Mapping[str, Mapping[str, float]]

    def length(self, rows: str) -> float:
        """Return the acceptance length on a set of rows."""
        return self.replay[rows]["acceptance_length"]


def trained_table(figures: Sequence[Figures], chain: int) -> Iterator[str]:
    """Yield the lines of a table of every draft, by replay; rates are those of the first set of rows."""
    sets = list(figures[0].replay)
    heads = [f"replay, {one}" for one in sets]
    yield f"| draft | learning rate | seed | {' | '.join(heads)} | rounds that accept at least 1 to {chain} | CPU |"
    yield f"|---|---|---|{'---|' * len(sets)}---|---|"
    for one in figures:
        about, first = one.trained, one.replay[sets[0]]
        cells = [NAMES[about.key], f"{about.rate:g}", str(about.seed), *(f"{one.length(name):.3f}" for name in sets)]
        cells.append(" ".join(f"{first[f'accept_rate_pos_{position}']:.3f}" for position in range(1, chain + 1)))
        yield f"| {' | '.join([*cells, f'{about.seconds:.0f} s'])} |"


def decoded_table(figures: Sequence[Figures], decoding: Sequence[Results]) -> Iterator[str]:
    """Yield the lines of a table of each trainer's drafts on each set, means over their seeds.

    Args:
        figures: The drafts.
        decoding: Results of decoding with them, one for each temperature.
    """
    columns = [
        (results, method)
        for results in decoding
        for method in dict.fromkeys(one.proposal["proposal_type"] for one in results.contenders)
    ]
    heads = [f"{SHAPES[method]}, T = {results.sampling.temperature:g}" for results, method in columns]
    yield f"| draft | learning rate | seeds | set | replay | {' | '.join(heads)} | identical at T = 0 |"
    yield f"|---|---|---|---|---|{'---|' * len(heads)}---|"
    for key in dict.fromkeys(one.trained.key for one in figures):
        own = [one for one in figures if one.trained.key == key]
        drafts = {str(one.trained.draft) for one in own}
        for rows in own[0].replay:
            found = [_measurements(results, method, drafts, rows) for results, method in columns]
            cells = [NAMES[key], f"{own[0].trained.rate:g}", str(len(own)), rows]
            cells += [_mean([one.length(rows) for one in own])]
            cells += [_mean([one.acceptance_length for one in cell]) for cell in found]
            yield f"| {' | '.join([*cells, _identical([one for cell in found for one in cell])])} |"


def _measurements(results: Results, method: str, drafts: set[str], rows: str) -> list[Measurement]:
    """Return the measurements of some drafts and a method on a set."""
    chosen = [one for one in results.contenders if one.draft in drafts and one.proposal["proposal_type"] == method]
    return [one for contender in chosen for one in contender.sets if one.prompt_set == rows]


def _mean(lengths: Sequence[float]) -> str:
    return f"{statistics.fmean(lengths):.2f}"


def _identical(measurements: Sequence[Measurement]) -> str:
    compared = [one for one in measurements if one.identical_responses is not None]
    identical = sum(one.identical_responses or 0 for one in compared)
    return f"{identical:,} of {sum(one.responses for one in compared):,}"
