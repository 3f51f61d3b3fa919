"""Parsing of a proposal method from text: ``NAME``, or ``NAME:KEY=VALUE,KEY=VALUE``."""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import ValidationError

from specforge.config import SpeculatorModelConfig, TokenProposalConfig
from specforge.errors import UsageError, describe_invalid, nearest_name
from specforge.hookspecs import ProposalMethod
from specforge.registry import installed


def choose_proposal(text: str | None, draft: SpeculatorModelConfig | None, **given: Any) -> TokenProposalConfig:
    """Return the settings of a proposal method.

    Args:
        text: ``greedy``, ``dynamic_tree:depth=5,speculative_tokens=32``, ...; None takes the draft's default method.
        draft: A draft's configuration; its stored settings take precedence over the method's defaults.
        **given: Further settings, overridden by the text; those that the method does not have are ignored.

    Raises:
        UsageError: There is no such method or setting, a value is wrong, or no method is given.
    """
    stored = draft.speculators_config if draft is not None else None
    if text is None:
        if stored is None:
            raise UsageError("no proposal method is set, and there is no draft that stores a default one")
        text = stored.default_proposal_method
    name, _, rest = text.partition(":")
    method = installed().find(ProposalMethod, name)
    config: type[TokenProposalConfig] = installed().load(method, "config")
    allowed = [key for key in config.model_fields if key != "proposal_type"]
    known = {one.proposal_type: one.model_dump() for one in (stored.proposal_methods if stored else [])}
    values = known.get(name, {}) | {key: value for key, value in given.items() if key in allowed}
    # Commas within brackets belong to a list.
    for part in filter(None, re.split(r",(?![^\[]*\])", rest)):
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise UsageError(
                f"proposal {text!r}: {key!r} is not a setting of {name}; allowed, as KEY=VALUE: "
                f"{', '.join(allowed)}.{nearest_name(key, allowed)}"
            )
        values[key] = _value(value)
    try:
        return config.model_validate({"proposal_type": name, **values})
    except ValidationError as error:
        raise UsageError(f"proposal {text!r}: {describe_invalid(error)}") from None


def describe(proposal: TokenProposalConfig) -> str:
    """Return a proposal method as text: its name, and the settings that differ from the defaults."""
    fields = type(proposal).model_fields
    changed = [
        f"{key}={getattr(proposal, key)}"
        for key, field in fields.items()
        if key not in ("proposal_type", "table") and getattr(proposal, key) != field.default
    ]
    return proposal.proposal_type + (":" + ",".join(changed) if changed else "")


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
