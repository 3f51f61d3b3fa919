"""The part of ``specforge evaluate`` that measures serving engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jsonargparse import Namespace
from tqdm import tqdm

from specforge.data.text.prompts import Conversation
from specforge.evaluation.results import ContenderResult
from specforge.evaluation.served import Served
from specforge.sampling import Sampling


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
