"""Who wrote the responses of a row, and how: what decides whether an acceptance length on them is exact.

A row says so under the key ``origin``. Replay is exact on text that the verifier itself wrote, with the sampling that
decoding will use; on any other text the same figure is only a proxy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from specforge.config import verifier_difference
from specforge.data.text.bad_rows import BadRow
from specforge.data.text.records import Record
from specforge.errors import describe_invalid
from specforge.sampling import Sampling


class Origin(Sampling):
    """What a row says of its responses; keys beyond these, such as ``seed``, are allowed.

    Attributes:
        model: Name of the model that wrote them, for people.
        fingerprint: Fingerprint of its weights, as ``specforge.verifier.fingerprint`` gives it.
        temperature: Temperature that they were sampled at; 0 for greedy ones.
        top_k: Sampled from the k most probable tokens alone; 0 for all.
        top_p: Sampled from the fewest tokens that hold this much probability.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str
    fingerprint: str
    temperature: float = Field(ge=0)

    @property
    def sampling(self) -> Sampling:
        """How the tokens were chosen."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def read_origin(record: Record) -> Origin | None:
    """Return what a row says of its responses; None where it says nothing.

    Raises:
        BadRow: ``origin`` is there, but wrong.
    """
    value = record.value.get("origin")
    if value is None:
        return None
    try:
        return Origin.model_validate(value)
    except ValidationError as error:
        raise BadRow(record.location, "malformed origin", f"origin: {describe_invalid(error)}") from None


def template_arguments_of(record: Record) -> dict[str, Any] | None:
    """Return the template arguments that a row's responses were written with; None where it does not say."""
    origin = record.value.get("origin")
    arguments = origin.get("template_arguments") if isinstance(origin, dict) else None
    return arguments if isinstance(arguments, dict) else None


def why_proxy(origins: Sequence[Origin | None], fingerprint: str) -> str | None:
    """Return why an acceptance length on some rows is only a proxy; None where it is exact.

    Args:
        origins: The different origins of the rows.
        fingerprint: Fingerprint of the verifier that decodes.
    """
    if None in origins:
        return "rows do not say who wrote their responses (key 'origin')"
    for origin in origins:
        if origin is not None and origin.fingerprint != fingerprint:
            return _other_verifier(origin, fingerprint)
    if len(origins) > 1:
        return "responses were sampled in different ways"
    return None


def _other_verifier(origin: Origin, fingerprint: str) -> str:
    if not origin.fingerprint:
        return f"responses were written by {origin.model}, which is not known to be this verifier"
    return (
        f"responses were written by {origin.model} ({origin.fingerprint}), which is not this verifier ({fingerprint}): "
        f"{verifier_difference(origin.fingerprint, fingerprint)}. Let this verifier answer the prompts with specforge "
        "prepare responses; or, if it did write them, set that fingerprint in the rows"
    )
