"""Markdown tables of the trained drafts and their measurements."""

from __future__ import annotations

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
        replay: The figures of ``specforge.decoding.replay.figures`` by the name of a set of rows.
    """

    trained: Trained
    replay: Mapping[str, Mapping[str, float]]

    def length(self, rows: str) -> float:
        """Return the acceptance length on a set of rows."""
        return self.replay[rows]["acceptance_length"]


def trained_table(figures: Sequence[Figures], chain: int) -> Iterator[str]:
    """Yield the lines of a table of all drafts, by replay; rates are those of the first set of rows."""
    sets = list(figures[0].replay)
    heads = [f"replay, {rows}" for rows in sets]
    yield f"| draft | learning rate | seed | {' | '.join(heads)} | rounds that accept at least 1 to {chain} | CPU |"
    yield f"|---|---|---|{'---|' * len(sets)}---|---|"
    for figure in figures:
        about, first = figure.trained, figure.replay[sets[0]]
        cells = [NAMES[about.key], f"{about.rate:g}", str(about.seed), *(f"{figure.length(name):.3f}" for name in sets)]
        cells.append(" ".join(f"{first[f'accept_rate_pos_{position}']:.3f}" for position in range(1, chain + 1)))
        yield f"| {' | '.join([*cells, f'{about.seconds:.0f} s'])} |"


def decoded_table(figures: Sequence[Figures], decoding: Sequence[Results]) -> Iterator[str]:
    """Yield the lines of a table of decoding each set with some drafts.

    Args:
        figures: The drafts.
        decoding: Results of decoding with them, one for each temperature.
    """
    columns = [
        (results, method)
        for results in decoding
        for method in dict.fromkeys(contender.proposal["proposal_type"] for contender in results.contenders)
    ]
    heads = [f"{SHAPES[method]}, T = {results.sampling.temperature:g}" for results, method in columns]
    yield f"| draft | learning rate | set | replay | {' | '.join(heads)} | identical at T = 0 |"
    yield f"|---|---|---|---|{'---|' * len(heads)}---|"
    for figure in figures:
        about = figure.trained
        for rows in figure.replay:
            found = [_measurement(results, method, str(about.draft), rows) for results, method in columns]
            lengths = [figure.length(rows), *(cell.acceptance_length for cell in found)]
            cells = [NAMES[about.key], f"{about.rate:g}", rows, *(f"{length:.2f}" for length in lengths)]
            yield f"| {' | '.join([*cells, _identical(found)])} |"


def _measurement(results: Results, method: str, draft: str, rows: str) -> Measurement:
    """Return the measurement of a draft and a method on a set."""
    (contender,) = [
        candidate
        for candidate in results.contenders
        if candidate.draft == draft and candidate.proposal["proposal_type"] == method
    ]
    return next(measurement for measurement in contender.sets if measurement.prompt_set == rows)


def _identical(measurements: Sequence[Measurement]) -> str:
    compared = [measurement for measurement in measurements if measurement.identical_responses is not None]
    identical = sum(measurement.identical_responses or 0 for measurement in compared)
    return f"{identical:,} of {sum(measurement.responses for measurement in compared):,}"
