"""Rotary positions of stored decoder layers, published under many keys, collected under one."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

PARAMETERS, SCALING, BASE = "rope_parameters", "rope_scaling", "rope_theta"


def with_settled_rope(layers: dict[str, Any], plain: Collection[str]) -> dict[str, Any]:
    """Collect the rotary parameters under ``rope_parameters``.

    They are read from ``rope_parameters`` (transformers 5), ``rope_scaling`` and ``rope_theta`` (earlier versions), and
    a ``rope_theta`` inside ``rope_scaling``. Nulls count as missing. If no base is given, transformers uses the
    family's default: heads published without ``rope_theta`` were trained with it.

    Args:
        layers: Configuration of decoder layers, as in ``config.json``.
        plain: Model types whose layers have one position per token, without mrope.

    Raises:
        ValueError: Values contradict each other, have a wrong type, or ask for mrope; the key is named.
    """
    parameters, scaling = (_mapping(layers, name) for name in (PARAMETERS, SCALING))
    rest = {name: one for name, one in layers.items() if name not in (PARAMETERS, SCALING, BASE)}
    if any(isinstance(one, dict) for one in parameters.values()):
        # One set per kind of attention, as only transformers 5 writes it.
        return {**rest, PARAMETERS: parameters}
    rope: dict[str, Any] = {}
    for where, values in ((PARAMETERS, parameters), (SCALING, scaling), ("", _known({BASE: layers.get(BASE)}))):
        for name, value in values.items():
            if rope.setdefault(name, value) != value:
                raise ValueError(f"{where and where + '.'}{name} is {value!r}, but {rope[name]!r} elsewhere; keep one")
    base = rope.get(BASE)
    if base is not None and not (type(base) in (int, float) and math.isfinite(base) and base > 0):
        raise ValueError(f"{BASE} is {base!r}, and must be a number above 0")
    if layers.get("model_type", "llama") in plain:
        _check_plain(rope, plain)
    return {**rest, PARAMETERS: rope} if rope else rest


def _check_plain(rope: dict[str, Any], plain: Collection[str]) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "mrope" or "mrope_section" in rope:
        raise ValueError(
            f"{SCALING} asks for mrope, positions along several axes for text and images; drafts with "
            f"{' or '.join(plain)} layers have one position per token, so this head cannot be loaded"
        )
    known = ["default", *ROPE_INIT_FUNCTIONS]
    if kind not in known:
        raise ValueError(f"rope_type is {kind!r}; allowed: {', '.join(known)}")


def _mapping(layers: dict[str, Any], name: str) -> dict[str, Any]:
    values = layers.get(name)
    if not isinstance(values, dict | None):
        raise ValueError(f"{name} is {values!r:.80}, and must be a mapping or null")
    return _known(values or {})


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Drop nulls, and use the current name of the type."""
    known = {name: one for name, one in values.items() if one is not None}
    if "type" in known:
        known.setdefault("rope_type", known.pop("type"))
    return known
