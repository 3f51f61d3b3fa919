"""The report of an evaluation: ``results.json`` for programs and ``report.html``, one page that needs nothing else."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from specforge.commands.evaluate import words
from specforge.commands.evaluate.plots import plots
from specforge.errors import SpecforgeError
from specforge.evaluation.results import ContenderResult, Measurement, Results
from specforge.files import whole_file

RESULTS = "results.json"
REPORT = "report.html"
TEMPLATE = "page.html.jinja"


def write_report(results: Results, folder: Path) -> None:
    """Write ``results.json`` and ``report.html`` into a folder, which is created if need be.

    A full disk leaves an earlier report as it was. Other files in the folder are left alone.

    Raises:
        SpecforgeError: They cannot be written.
    """
    texts = {RESULTS: results.model_dump_json(indent=2) + "\n", REPORT: page(results)}
    try:
        with ExitStack() as written:  # all of them, before the first takes its place
            for name, text in texts.items():
                written.enter_context(whole_file(folder / name)).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecforgeError(f"the report cannot be written to {folder}: {error}") from error


def page(results: Results) -> str:
    """Return the report as one HTML page; equal results give equal pages, byte for byte."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names are what a person typed
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        results=results,
        conditions=words.conditions(results),
        settings=words.settings(results),
        warnings=words.warnings(results),
        summary=_summary(results),
        headline=[(one, _headline(one.all_sets)) for one in results.contenders],
        plots=plots(results),
        details=[_details(one) for one in results.contenders],
    )


def _summary(results: Results) -> str:
    """Say which contender is accepted most and which is fastest; an empty string where nothing was measured."""
    measured = [one for one in results.contenders if one.all_sets.num_drafts]
    if not measured:
        return ""
    accepted = max(measured, key=lambda one: one.all_sets.acceptance_length)
    fastest = max(measured, key=lambda one: one.all_sets.speedup)
    return (
        f"Accepted most: {accepted.name}, {words.acceptance_length(accepted.all_sets)} tokens a verifier pass. "
        f"Fastest: {fastest.name}, {words.decimal(fastest.all_sets.speedup)} times the verifier alone."
    )


def _headline(pooled: Measurement) -> dict[str, str]:
    return {
        "Acceptance length": words.acceptance_length(pooled),
        "95 % interval": words.interval(pooled) or words.UNKNOWN,
        "Draft acceptance rate": words.draft_acceptance_rate(pooled),
        "Tokens a second": words.decimal(pooled.tokens_per_second, 1),
        "Verifier alone": words.decimal(pooled.tokens_per_second_alone, 1),
        "Speedup": f"{words.decimal(pooled.speedup)}×",
        "Identical responses": words.identical(pooled),
    }


@dataclass(frozen=True)
class _Details:
    """The table of everything about a contender.

    Attributes:
        contender: Whose it is.
        proposal: Its proposal method and the settings.
        columns: Prompt sets.
        rows: For each figure, its value for each of them.
    """

    contender: ContenderResult
    proposal: str
    columns: list[str]
    rows: dict[str, list[str]]


def _details(contender: ContenderResult) -> _Details:
    measured = words.measurements(contender)
    columns = [_figures(one) for one in measured]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    return _Details(contender, words.proposal(contender), [one.prompt_set for one in measured], rows)


def _figures(measurement: Measurement) -> dict[str, str]:
    stretches = [
        f"{each.begin}–{each.end - 1}: {words.decimal(each.acceptance_length)} ({each.drafts:,})"
        for each in measurement.by_stretch
    ]
    return {
        "Responses": f"{measurement.responses:,}",
        "Tokens": f"{measurement.tokens:,}",
        "Mean acceptance length": words.acceptance_length(measurement, 3),
        "95 % confidence interval": words.interval(measurement, 3) or words.UNKNOWN,
        "Per-position acceptance rate": words.series(measurement.accept_rate_pos),
        "Conditional acceptance rate": words.series(measurement.accept_rate_cond),
        "Drafts": f"{measurement.num_drafts:,}",
        "Draft tokens": f"{measurement.num_draft_tokens:,}",
        "Accepted tokens": f"{measurement.num_accepted_tokens:,}",
        "Avg Draft acceptance rate": words.draft_acceptance_rate(measurement),
        "Drafts by accepted tokens, 0, 1, …": words.series(measurement.histogram, 0),
        "Draft, ms a round": words.decimal(measurement.draft_milliseconds, 3),
        "Verifier, ms a round": words.decimal(measurement.verifier_milliseconds, 3),
        "Other, ms a round": words.decimal(measurement.other_milliseconds, 3),
        "Other, of the verifier's time": words.other_share(measurement),
        "Tokens a second": words.decimal(measurement.tokens_per_second, 1),
        "Tokens a second, verifier alone": words.decimal(measurement.tokens_per_second_alone, 1),
        "Speedup": f"{words.decimal(measurement.speedup, 3)}×",
        "Identical responses": words.identical(measurement),
        "Acceptance length by stretch of the response (drafts)": "\n".join(stretches) or words.UNKNOWN,
        "Acceptance length with chains of K = 1, 2, …": words.series(measurement.by_chain_length, 3),
    }
