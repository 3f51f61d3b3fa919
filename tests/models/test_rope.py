"""Rotary positions under all their published names."""

from __future__ import annotations

from typing import Any

import pytest

from specforge.models.base_components import PLAIN
from specforge.models.rope import with_settled_rope

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("stored", "rope"),
    [
        ({}, None),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, None),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
        ({"rope_theta": None, "rope_scaling": DEFAULT}, DEFAULT),
        ({"rope_theta": 500000, "rope_scaling": DEFAULT}, DEFAULT),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}, YARN),
        ({"rope_parameters": YARN}, YARN),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e6}, YARN),
        ({"rope_parameters": {"full_attention": YARN}}, {"full_attention": YARN}),
    ],
)
def test_they_are_collected_under_one_key(stored: dict[str, Any], rope: dict[str, Any] | None) -> None:
    settled = with_settled_rope({"hidden_size": 8, **stored}, PLAIN)
    assert settled == {"hidden_size": 8} | ({} if rope is None else {"rope_parameters": rope})


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"rope_theta": 1e4, "rope_scaling": DEFAULT}, "rope_theta is 10000.0, but 500000.0 elsewhere"),
        ({"rope_parameters": YARN, "rope_scaling": {"factor": 2.0}}, "rope_scaling.factor is 2.0, but 4.0 elsewhere"),
        ({"rope_theta": "much"}, "rope_theta is 'much', and must be a number above 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], and must be a mapping or null"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "asks for mrope"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2, 3]}}, "asks for mrope"),
        ({"rope_scaling": {"rope_type": "own"}}, "rope_type is 'own'; allowed: default, "),
    ],
)
def test_contradictory_or_unsupported_settings_are_refused(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settled_rope(stored, PLAIN)


def test_families_that_know_mrope_keep_it() -> None:
    rope = {"rope_type": "default", "mrope_section": [1, 2, 3], "rope_theta": 1e6}
    stored = {"model_type": "qwen3_vl_text", "rope_parameters": rope}
    assert with_settled_rope(stored, PLAIN) == stored
