"""How the figures of an evaluation are said, on the terminal and on the page alike: numbers, settings, warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

from specforge.evaluation.results import ContenderResult, Measurement, Results

UNKNOWN = "–"
LOSSY = "LOSSY: output may differ from the verifier's own"


def decimal(value: float, digits: int = 2) -> str:
    """Return a number with so many decimals, or a dash where there is none."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else UNKNOWN


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else UNKNOWN


def series(values: Iterable[float], digits: int = 3) -> str:
    """Return numbers in a row, or a dash where there are none."""
    return ", ".join(decimal(value, digits) for value in values) or UNKNOWN


def acceptance_length(measurement: Measurement, digits: int = 2) -> str:
    """Return the acceptance length; without a single draft there is none."""
    return decimal(measurement.acceptance_length, digits) if measurement.num_drafts else UNKNOWN


def draft_acceptance_rate(measurement: Measurement) -> str:
    """Return the share of the proposed tokens that was accepted; without a proposed token there is none."""
    return percent(measurement.draft_acceptance_rate) if measurement.num_draft_tokens else UNKNOWN


def interval(measurement: Measurement, digits: int = 2) -> str:
    """Return the acceptance length's confidence interval as ``[2.33, 2.49]``, or an empty string without one."""
    if measurement.confidence_interval is None or not measurement.num_drafts:
        return ""
    low, high = measurement.confidence_interval
    return f"[{decimal(low, digits)}, {decimal(high, digits)}]"


def other_share(measurement: Measurement) -> str:
    """Return the time of the loop itself as a share of the verifier's."""
    if not measurement.verifier_milliseconds:
        return UNKNOWN
    return percent(measurement.other_milliseconds / measurement.verifier_milliseconds)


def identical(measurement: Measurement) -> str:
    """Return how many responses are the verifier's own, such as ``39 of 40``."""
    if measurement.identical_responses is None:
        return UNKNOWN
    return f"{measurement.identical_responses:,} of {measurement.responses:,}"


def shortened(name: str, length: int) -> str:
    """Leave out the middle of a name longer than this many characters: begin and end tell checkpoints apart."""
    kept = length - 1
    return name if len(name) <= length else f"{name[: kept // 2]}…{name[kept // 2 - kept :]}"


def measurements(contender: ContenderResult) -> list[Measurement]:
    """Return a contender's measurements by prompt set, then over all of them where there are several."""
    return contender.sets if len(contender.sets) == 1 else [*contender.sets, contender.all_sets]


def proposal(contender: ContenderResult) -> str:
    """Return a contender's proposal method and its settings, such as ``greedy, speculative_tokens 5``."""
    parts = [
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in contender.proposal.values()
    ]
    named = zip(contender.proposal, parts, strict=True)
    return ", ".join(value if name == "proposal_type" else f"{name} {value}" for name, value in named) or UNKNOWN


def settings(results: Results) -> dict[str, str]:
    """Return what the evaluation ran with, by its name for people."""
    chosen = results.sampling
    sampling = "greedy (temperature 0)" if chosen.is_greedy else f"temperature {chosen.temperature:g}"
    if not chosen.is_greedy and chosen.top_k:
        sampling += f", top-k {chosen.top_k}"
    if not chosen.is_greedy and chosen.top_p < 1:
        sampling += f", top-p {chosen.top_p:g}"
    return {
        "Verifier": f"{results.verifier} ({parameters(results.verifier_parameters)})",
        "Sampling": sampling,
        "Verification": results.verification,
        "Most new tokens": f"{results.max_new_tokens:,}",
        "Batch size": f"{results.batch_size:,}",
        "Seed": str(results.seed),
        "Prompt sets": ", ".join(results.prompt_sets) or UNKNOWN,
        "Machine": results.machine,
        "Versions": ", ".join(f"{name} {version}" for name, version in results.versions.items()) or UNKNOWN,
    }


def conditions(results: Results) -> str:
    """Return in one line what the figures depend on besides the contenders and prompts."""
    named = settings(results)
    return (
        f"{named['Sampling']}, {named['Verification']} verification, up to {named['Most new tokens']} new tokens, "
        f"batch size {named['Batch size']}"
    )


def parameters(number: int) -> str:
    """Return a number of weights in the largest unit that leaves a whole one, such as ``134.5 M weights``."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit} weights"
    return f"{number} weights"


def warnings(results: Results) -> list[str]:
    """Return what a reader has to know before any figure, one sentence each; empty when all is well."""
    by_name = {one.name: one for one in results.contenders}
    lines = []
    for name, best in results.beaten_by_baselines().items():
        ours, theirs = (acceptance_length(by_name[one].all_sets, 3) for one in (name, best))
        lines.append(
            f"{name} does not beat the baseline {best}, which needs no draft: "
            f"{ours} tokens a verifier pass against {theirs}"
        )
    lines += [f"{one.name}: {one.all_sets.difference}" for one in results.contenders if one.all_sets.difference]
    for one in results.contenders:
        if one.is_lossy:
            lines.append(f"{one.name} is {LOSSY}")
        elif _differing(one.all_sets):
            lines.append(
                f"{one.name} is lossless, and yet {_differing(one.all_sets):,} of {one.all_sets.responses:,} responses "
                "differ from the verifier's own: rounding decided between tokens that are nearly as probable, or "
                "something is wrong"
            )
    return lines


def _differing(measurement: Measurement) -> int:
    same = measurement.identical_responses
    return 0 if same is None else measurement.responses - same
