"""Formatting of an evaluation's figures, settings and warnings, for both terminal and page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

from specforge.evaluation.results import ContenderResult, Measurement, Results

UNKNOWN = "–"
CHEAP_VERIFIER = 0.5  # share of the verifier's time that drafting takes; a few per cent if the verifier is large
LOSSY = "LOSSY: output may differ from the verifier's own"


def decimal(value: float, digits: int = 2) -> str:
    """Return a number with ``digits`` decimals, or a dash if it is not finite."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else UNKNOWN


def percent(share: float) -> str:
    """Return a share as a percentage, or a dash if it is not finite."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else UNKNOWN


def series(values: Iterable[float], digits: int = 3) -> str:
    """Return numbers separated by commas, or a dash if there are none."""
    return ", ".join(decimal(value, digits) for value in values) or UNKNOWN


def acceptance_length(measurement: Measurement, digits: int = 2) -> str:
    """Return the acceptance length, or a dash without any drafts."""
    return decimal(measurement.acceptance_length, digits) if measurement.num_drafts else UNKNOWN


def draft_acceptance_rate(measurement: Measurement) -> str:
    """Return the share of the proposed tokens that were accepted, or a dash without any."""
    return percent(measurement.draft_acceptance_rate) if measurement.num_draft_tokens else UNKNOWN


def interval(measurement: Measurement, digits: int = 2) -> str:
    """Return the acceptance length's confidence interval as ``[2.33, 2.49]``, or an empty string without one."""
    if measurement.confidence_interval is None or not measurement.num_drafts:
        return ""
    low, high = measurement.confidence_interval
    return f"[{decimal(low, digits)}, {decimal(high, digits)}]"


def other_share(measurement: Measurement) -> str:
    """Return the time of the loop itself, relative to the verifier's."""
    if not measurement.verifier_milliseconds:
        return UNKNOWN
    return percent(measurement.other_milliseconds / measurement.verifier_milliseconds)


def identical(measurement: Measurement) -> str:
    """Return the number of responses that are the verifier's own, such as ``39 of 40``."""
    if measurement.identical_responses is None:
        return UNKNOWN
    return f"{measurement.identical_responses:,} of {measurement.responses:,}"


def modelled(contender: ContenderResult) -> str:
    """Return the modelled speedups, with the cost that they assume; a dash if it is unknown."""
    if contender.draft_cost is None or not contender.modelled_speedups:
        return UNKNOWN
    return f"{series(contender.modelled_speedups, 2)} (a pass of the draft costs {percent(contender.draft_cost)})"


def shortened(name: str, length: int) -> str:
    """Shorten a name to ``length`` characters by its middle, since start and end distinguish checkpoints."""
    kept = length - 1
    return name if len(name) <= length else f"{name[: kept // 2]}…{name[kept // 2 - kept :]}"


def measurements(contender: ContenderResult) -> list[Measurement]:
    """Return a contender's measurements by prompt set, and over all of them if there are several."""
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
    """Return the settings of the evaluation by display name."""
    chosen = results.sampling
    sampling = "greedy (temperature 0)" if chosen.is_greedy else f"temperature {chosen.temperature:g}"
    if not chosen.is_greedy and chosen.top_k:
        sampling += f", top-k {chosen.top_k}"
    if not chosen.is_greedy and chosen.top_p < 1:
        sampling += f", top-p {chosen.top_p:g}"
    size = "" if results.verifier_parameters is None else f" ({parameters(results.verifier_parameters)})"
    named = {
        "Verifier": f"{results.verifier}{size}",
        "Sampling": sampling,
        "Maximum new tokens": f"{results.max_new_tokens:,}",
        "Seed": str(results.seed),
        "Prompt sets": ", ".join(results.prompt_sets) or UNKNOWN,
    }
    if in_process(results):
        named |= {
            "Verification": results.verification,
            "Batch size": f"{results.batch_size:,}",
            "Machine": results.machine,
        }
    return {
        **named,
        "Versions": ", ".join(f"{name} {version}" for name, version in results.versions.items()) or UNKNOWN,
    }


def conditions(results: Results) -> str:
    """Return in one line the settings that the figures depend on."""
    named = settings(results)
    text = f"{named['Sampling']}, up to {named['Maximum new tokens']} new tokens"
    if in_process(results):
        text += f", in process with {named['Verification']} verification and batch size {named['Batch size']}"
    return text


def in_process(results: Results) -> bool:
    """Return whether contenders were measured in this process, and not only servers."""
    return bool(results.contenders) or results.served is None


def parameters(number: int) -> str:
    """Return a number of weights in the largest unit that gives at least 1, such as ``134.5 M weights``."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit} weights"
    return f"{number} weights"


def warnings(results: Results) -> list[str]:
    """Return warnings that a reader must know before any figure, one sentence each."""
    by_name = {one.name: one for one in results.contenders}
    lines = []
    for name, best in results.beaten_by_baselines().items():
        ours, theirs = (acceptance_length(by_name[one].all_sets, 3) for one in (name, best))
        lines.append(
            f"{name} does not beat the baseline {best}, which needs no draft: "
            f"{ours} tokens per verifier pass against {theirs}"
        )
    for one in results.contenders:
        share = one.all_sets.draft_milliseconds / (one.all_sets.verifier_milliseconds or 1)
        if not one.is_baseline and share > CHEAP_VERIFIER:
            lines.append(
                f"{one.name}: its speed here says nothing about a large verifier, since drafting takes "
                f"{percent(share)} of the verifier's time; its acceptance length does"
            )
    lines += [f"{one.name}: {one.all_sets.difference}" for one in results.contenders if one.all_sets.difference]
    for one in results.contenders:
        if one.is_lossy:
            lines.append(f"{one.name} is {LOSSY}")
        elif _differing(one.all_sets):
            lines.append(
                f"{one.name} is lossless, but {_differing(one.all_sets):,} of {one.all_sets.responses:,} responses "
                "differ from the verifier's own: rounding decided between tokens of nearly equal probability, or "
                "something is wrong"
            )
    return lines


def _differing(measurement: Measurement) -> int:
    same = measurement.identical_responses
    return 0 if same is None else measurement.responses - same
