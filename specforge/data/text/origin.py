"""Who wrote the responses of a row, and how: this decides whether an acceptance length on them is exact.

A row states it under the key ``origin``. Replay is exact on text that the verifier itself generated with the sampling
that decoding will use; on any other text the same figure is only a proxy.
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
    """Origin of a row's responses; additional keys, such as ``seed``, are allowed.

    Attributes:
        model: Name of the model that wrote them, for messages.
        fingerprint: Fingerprint of its weights, see ``specforge.verifier.fingerprint``.
        temperature: Sampling temperature; 0 for greedy decoding.
        top_k: Sampling used only the k most probable tokens; 0 for all.
        top_p: Sampling used the smallest set of tokens with at least this probability.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str
    fingerprint: str
    temperature: float = Field(ge=0)

    @property
    def sampling(self) -> Sampling:
        """The sampling settings of the responses."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def read_origin(record: Record) -> Origin | None:
    """Return the origin of a row's responses; None if the row does not state it.

    Raises:
        BadRow: ``origin`` is malformed.
    """
    value = record.value.get("origin")
    if value is None:
        return None
    try:
        return Origin.model_validate(value)
    except ValidationError as error:
        raise BadRow(record.location, "malformed origin", f"origin: {describe_invalid(error)}") from None


def template_arguments_of(record: Record) -> dict[str, Any] | None:
    """Return the template arguments that a row's responses were written with; None if not stated."""
    origin = record.value.get("origin")
    arguments = origin.get("template_arguments") if isinstance(origin, dict) else None
    return arguments if isinstance(arguments, dict) else None


def why_proxy(origins: Sequence[Origin | None], fingerprint: str) -> str | None:
    """Return why an acceptance length on some rows is only a proxy; None if it is exact.

    Args:
        origins: The distinct origins of the rows.
        fingerprint: Fingerprint of the verifier that decodes.
    """
    if None in origins:
        return "rows do not state who wrote their responses (key 'origin')"
    for origin in origins:
        if origin is not None and origin.fingerprint != fingerprint:
            return _other_verifier(origin, fingerprint)
    if len(origins) > 1:
        return "responses were sampled with different settings"
    return None


def _other_verifier(origin: Origin, fingerprint: str) -> str:
    if not origin.fingerprint:
        return f"responses were written by {origin.model}, which is not known to be this verifier"
    return (
        f"responses were written by {origin.model} ({origin.fingerprint}), which is not this verifier ({fingerprint}): "
        f"{verifier_difference(origin.fingerprint, fingerprint)}. Let this verifier answer the prompts with specforge "
        "prepare responses; if it did write them, set its fingerprint in the rows"
    )
