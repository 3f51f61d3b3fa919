"""The part of ``specforge evaluate`` that measures serving engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from tqdm import tqdm

from specforge.data.text.prompts import Conversation
from specforge.errors import UsageError
from specforge.evaluation.results import ContenderResult
from specforge.evaluation.served import Served
from specforge.sampling import Sampling

CONCURRENCY = [1, 8, 64]


def add_server_flags(parser: ArgumentParser) -> None:
    """Add the flags that name servers and their load."""
    parser.add_argument(
        "--endpoint",
        type=str,
        nargs="+",
        default=[],
        metavar="URL",
        help="Servers to measure, with a draft: several may draft different numbers of tokens. Without DRAFT, nothing "
        "is measured in process.",
    )
    parser.add_argument(
        "--baseline", type=str | None, default=None, metavar="URL", help="The same server without speculation."
    )
    parser.add_argument(
        "--concurrency",
        type=PositiveInt,
        nargs="+",
        default=CONCURRENCY,
        metavar="N",
        help="Numbers of requests that a server gets at a time.",
    )
    parser.add_argument(
        "--model", type=str | None, default=None, metavar="NAME", help="The servers' name for the model."
    )
    parser.add_argument(
        "--timeout", type=PositiveFloat, default=600.0, metavar="SECONDS", help="Maximum time for a server's response."
    )


def check_server_flags(found: Namespace) -> None:
    """Check that the flags of servers fit together.

    Raises:
        UsageError: They do not.
    """
    if found.endpoint:
        return
    if found.baseline is not None:
        raise UsageError(
            "--baseline is a server without speculation, beside which those of --endpoint are measured; methods "
            "without a draft are --baselines"
        )
    for flag, is_set in (("--concurrency", found.concurrency != CONCURRENCY), ("--model", found.model is not None)):
        if is_set:
            raise UsageError(f"{flag} is for servers; name them with --endpoint")


def measure_servers(found: Namespace, sampling: Sampling, prompt_sets: Mapping[str, Sequence[Conversation]]) -> Served:
    """Measure the servers that the flags name, with a progress bar."""
    # The client takes a second to import.
    from specforge.engines.generation import GenerationSettings
    from specforge.evaluation.serving import ServedSettings, measure_served, reply_count

    generation = GenerationSettings(sampling, found.max_new_tokens, found.seed, found.template_arguments or {})
    settings = ServedSettings(
        endpoints=found.endpoint,
        baseline=found.baseline,
        model=found.model,
        concurrencies=sorted(set(found.concurrency)),
        generation=generation,
        timeout=found.timeout,
    )
    total = settings.number_of_runs * reply_count(prompt_sets)
    # disable=None shows the bar on a terminal only.
    with tqdm(total=total, desc="servers", unit=" responses", disable=None) as bar:
        return measure_served(settings, prompt_sets, bar.update)


def replayed_lengths(contenders: Sequence[ContenderResult]) -> list[float]:
    """Return the acceptance length for each number of tokens of the one draft that was measured; none for several."""
    drafts = [one for one in contenders if not one.is_baseline]
    return drafts[0].all_sets.by_chain_length if len({one.draft for one in drafts}) == 1 else []
