"""Asking a running server how it accepts on the probe's prompts: vLLM by its metrics, SGLang by its server info."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from openai import OpenAI, OpenAIError

from specforge.checkpoints.causes import cause_of_acceptance
from specforge.checkpoints.faults import Fault
from specforge.checkpoints.probe import Served, Text
from specforge.errors import SpecforgeError

SECONDS = 30
# One line of a Prometheus page: a counter of vLLM's speculative decoding, its labels and its value.
COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)(?:_total)?(?:\{(.*)\})?\s+([\d.eE+-]+)$", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Measured:
    """How a server accepts.

    Attributes:
        engine: Name of the server.
        acceptance_length: Tokens a pass of the verifier.
        chain: Tokens that it drafts in a round; None where it does not tell.
        accept_rates: Share of the rounds that accept at least k = 1, 2, ... tokens; empty where it does not tell.
    """

    engine: str
    acceptance_length: float
    chain: int | None
    accept_rates: list[float] = field(default_factory=list)


def measure(url: str, texts: list[Text]) -> Measured:
    """Let a server answer the probe's prompts at temperature 0, and read what it counts.

    Args:
        url: Address of the server, such as ``http://localhost:8000``.
        texts: Prompts, and what the verifier said; as many tokens are asked for.

    Raises:
        SpecforgeError: The server cannot be reached, is none of the two, or does not speculate.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if _get(f"{url}/get_server_info") is not None:
        _answer(url, texts)
        return _from_server_info(json.loads(_get(f"{url}/get_server_info") or "{}"), url)
    before = _counters(url)
    _answer(url, texts)
    counted = {name: value - before.get(name, 0.0) for name, value in _counters(url).items()}
    rounds = counted.get("drafts", 0.0)
    if rounds <= 0:
        raise SpecforgeError(f"{url} answered without drafting once; is it served with a speculative configuration?")
    places = sorted((name for name in counted if isinstance(name, int)), key=int)
    return Measured(
        "vLLM",
        1 + counted.get("accepted_tokens", 0.0) / rounds,
        round(counted["draft_tokens"] / rounds) if "draft_tokens" in counted else None,
        [counted[place] / rounds for place in places],
    )


def endpoint_faults(measured: Measured, expected: Served) -> list[Fault]:
    """Compare what a server does with what is expected of it.

    Numbers of other types and kernels turn single tokens of a text, so that the figures are not quite equal.
    """
    wanted = expected.expected(measured.chain)
    if abs(measured.acceptance_length - wanted) <= max(0.05, 0.15 * (wanted - 1)):
        return []
    what = f"the server accepts {measured.acceptance_length:.3f} tokens a pass, and {wanted:.3f} are expected"
    if measured.acceptance_length > wanted:
        return [
            Fault(what, "it does not serve this draft, or this verifier, or it accepts what the verifier would not")
        ]
    return [Fault(what, cause_of_acceptance(measured.accept_rates, expected.accept_rates))]


def _answer(url: str, texts: list[Text]) -> None:
    # A local server asks for no key, but the client insists on one.
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    try:
        model = client.models.list().data[0].id
        for text in texts:
            client.completions.create(
                model=model,
                prompt=text.tokens[: text.begin],
                max_tokens=len(text.tokens) - text.begin,
                temperature=0,
            )
    except (OpenAIError, IndexError) as error:
        raise SpecforgeError(f"{url} does not answer the probe's prompts: {error}") from error


def _counters(url: str) -> dict[str | int, float]:
    """Return vLLM's counters, summed over its engines: by name, those by position under its number."""
    page = _get(f"{url}/metrics")
    if page is None or "vllm:" not in page:
        raise SpecforgeError(f"{url} has neither vLLM's /metrics nor SGLang's /get_server_info")
    found: dict[str | int, float] = defaultdict(float)
    for name, labels, value in COUNTER.findall(page):
        position = POSITION.search(labels)
        if name == "accepted_tokens_per_pos" and position:
            found[int(position[1])] += float(value)
        elif not name.endswith("_created"):
            found[name] += float(value)
    return dict(found)


def _from_server_info(info: dict[str, Any], url: str) -> Measured:
    states = [one for one in info.get("internal_states") or [] if isinstance(one, dict)]
    lengths = [one["avg_spec_accept_length"] for one in states if one.get("avg_spec_accept_length")]
    if not lengths:
        raise SpecforgeError(f"{url}/get_server_info says nothing of acceptance; is it served with a draft?")
    # A mean since the server was started: other requests count as well.
    return Measured("SGLang", sum(lengths) / len(lengths), info.get("speculative_num_steps"))


def _get(address: str) -> str | None:
    """Return what a server says at an address; None where it knows no such one."""
    try:
        with urlopen(address, timeout=SECONDS) as answer:
            text: str = answer.read().decode()
            return text
    except HTTPError:
        return None
    except (OSError, ValueError) as error:
        raise SpecforgeError(f"{address} cannot be read: {error}; is the server running there?") from error
