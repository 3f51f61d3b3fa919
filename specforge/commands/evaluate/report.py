"""The report of an evaluation: ``results.json`` for programs and ``report.html``, one self-contained page."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from specforge.commands.evaluate import formatting, served_formatting
from specforge.commands.evaluate.plots import plots
from specforge.commands.evaluate.served_plots import served_plots
from specforge.errors import SpecforgeError, UsageError
from specforge.evaluation.results import ContenderResult, Measurement, Results
from specforge.evaluation.served import Served
from specforge.files import whole_file

RESULTS = "results.json"
REPORT = "report.html"
TEMPLATE = "page.html.jinja"
MODELLED = "Modelled speedup with chains of K = 1, 2, …"


def check_folder(folder: Path) -> None:
    """Check that a report can be written into a folder, before there is one.

    Raises:
        UsageError: It is a file, inside one, or not writable.
    """
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UsageError(f"--output: {there} is not a folder that can be written to; give another one")


def write_report(results: Results, folder: Path) -> None:
    """Write ``results.json`` and ``report.html`` into a folder, which is created if needed.

    If writing fails, an earlier report is unchanged. Other files in the folder are kept.

    Raises:
        SpecforgeError: They cannot be written.
    """
    texts = {RESULTS: results.model_dump_json(indent=2) + "\n", REPORT: page(results)}
    try:
        with ExitStack() as written:  # write all of them before the first is renamed
            for name, text in texts.items():
                written.enter_context(whole_file(folder / name)).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecforgeError(f"the report cannot be written to {folder}: {error}") from error


def page(results: Results) -> str:
    """Return the report as one HTML page; equal results give equal pages, byte for byte."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names are user input
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        results=results,
        conditions=formatting.conditions(results),
        settings=formatting.settings(results),
        warnings=[*formatting.warnings(results), *served_formatting.warnings(results.served)],
        summary=_summary(results),
        headline=[(one, _headline(one.all_sets)) for one in results.contenders],
        plots=plots(results),
        servers=None if results.served is None else _servers(results.served),
        details=[_details(one) for one in results.contenders],
    )


def _summary(results: Results) -> str:
    """Name the contenders with the highest acceptance length and speedup; empty if nothing was measured."""
    measured = [one for one in results.contenders if one.all_sets.num_drafts]
    if not measured:
        return ""
    accepted = max(measured, key=lambda one: one.all_sets.acceptance_length)
    fastest = max(measured, key=lambda one: one.all_sets.speedup)
    return (
        f"Highest acceptance: {accepted.name}, {formatting.acceptance_length(accepted.all_sets)} tokens per verifier "
        f"pass. Fastest: {fastest.name}, {formatting.decimal(fastest.all_sets.speedup)} times the verifier alone."
    )


def _servers(served: Served) -> dict[str, Any]:
    """Return what the page shows of servers."""
    drafted = range(1, max((len(one.lengths) for one in served.expectations), default=0) + 1)
    return {
        "rows": [
            (load, served_formatting.server_name(server), measured, served_formatting.figures(measured))
            for load in served.concurrencies
            for server in served.servers
            for measured in server.at(load)
        ],
        "advice": [served_formatting.advice(one) for one in served.expectations],
        "basis": [served_formatting.basis(one) for one in served.expectations],
        "loads": [served_formatting.requests(one.concurrency) for one in served.expectations],
        "expected": {
            number: [served_formatting.expected_cell(one, number) for one in served.expectations] for number in drafted
        },
        "plots": served_plots(served),
    }


def _headline(pooled: Measurement) -> dict[str, str]:
    return {
        "Acceptance length": formatting.acceptance_length(pooled),
        "95 % interval": formatting.interval(pooled) or formatting.UNKNOWN,
        "Draft acceptance rate": formatting.draft_acceptance_rate(pooled),
        "Tokens per second": formatting.decimal(pooled.tokens_per_second, 1),
        "Verifier alone": formatting.decimal(pooled.tokens_per_second_alone, 1),
        "Speedup": f"{formatting.decimal(pooled.speedup)}×",
        "Identical responses": formatting.identical(pooled),
    }


@dataclass(frozen=True)
class _Details:
    """The table of all figures of a contender.

    Attributes:
        contender: The contender.
        proposal: Its proposal method with settings.
        columns: Names of the prompt sets.
        rows: For each figure, its value on each prompt set.
    """

    contender: ContenderResult
    proposal: str
    columns: list[str]
    rows: dict[str, list[str]]


def _details(contender: ContenderResult) -> _Details:
    measured = formatting.measurements(contender)
    columns = [_figures(one) for one in measured]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    # Of all prompt sets together, which is the last column.
    rows[MODELLED] = [*("" for _ in measured[1:]), formatting.modelled(contender)]
    return _Details(contender, formatting.proposal(contender), [one.prompt_set for one in measured], rows)


def _figures(measurement: Measurement) -> dict[str, str]:
    spans = [
        f"{each.begin}–{each.end - 1}: {formatting.decimal(each.acceptance_length)} ({each.drafts:,})"
        for each in measurement.by_stretch
    ]
    return {
        "Responses": f"{measurement.responses:,}",
        "Tokens": f"{measurement.tokens:,}",
        "Mean acceptance length": formatting.acceptance_length(measurement, 3),
        "95 % confidence interval": formatting.interval(measurement, 3) or formatting.UNKNOWN,
        "Per-position acceptance rate": formatting.series(measurement.accept_rate_pos),
        "Conditional acceptance rate": formatting.series(measurement.accept_rate_cond),
        "Drafts": f"{measurement.num_drafts:,}",
        "Draft tokens": f"{measurement.num_draft_tokens:,}",
        "Accepted tokens": f"{measurement.num_accepted_tokens:,}",
        "Avg Draft acceptance rate": formatting.draft_acceptance_rate(measurement),
        "Drafts by accepted tokens, 0, 1, …": formatting.series(measurement.histogram, 0),
        "Draft, ms per round": formatting.decimal(measurement.draft_milliseconds, 3),
        "Verifier, ms per round": formatting.decimal(measurement.verifier_milliseconds, 3),
        "Other, ms per round": formatting.decimal(measurement.other_milliseconds, 3),
        "Other / verifier time": formatting.other_share(measurement),
        "Tokens per second": formatting.decimal(measurement.tokens_per_second, 1),
        "Tokens per second, verifier alone": formatting.decimal(measurement.tokens_per_second_alone, 1),
        "Speedup": f"{formatting.decimal(measurement.speedup, 3)}×",
        "Identical responses": formatting.identical(measurement),
        "Acceptance length by position in the response (drafts)": "\n".join(spans) or formatting.UNKNOWN,
        "Acceptance length with chains of K = 1, 2, …": formatting.series(measurement.by_chain_length, 3),
    }
