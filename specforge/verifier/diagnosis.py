"""Why a verifier's ``config.json`` does not make a model, or not the one that its weights are of: by the key."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from specforge.config import find_file
from specforge.errors import nearest_name

MOST_LAYERS = 1000
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")

Build = Callable[[PreTrainedConfig], PreTrainedModel]


def reason_of(error: BaseException) -> str:
    """Return what an error says, in one line; of a field that transformers refuses, what is allowed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith(("Validation error for field", "Class validation error")):
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0] if lines else type(error).__name__


def why_not_read(values: Mapping[str, Any], error: BaseException) -> str:
    """Say why transformers refuses a ``config.json``, with the keys without which it would not.

    Args:
        values: The parsed file.
        error: How reading it failed.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = nearest_name(str(model_type), CONFIG_MAPPING.keys())
        return f"model_type: transformers knows no {model_type!r}.{hint}"
    reason = reason_of(error)
    if any(f"'{key}'" in reason for key in values):
        return reason
    keys = [key for key in values if _is_read({name: one for name, one in values.items() if name != key})]
    named = ", ".join(f"{key} {values[key]!r:.80}" for key in keys)
    return f"{named}: {reason}" if named else reason


def field_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a ``config.json`` says with a wrong type, of fields that transformers does not check."""
    classes = values.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(one, str) for one in classes)):
        yield f"architectures must be a list of class names, not {classes!r}"


def size_faults(config: PreTrainedConfig) -> Iterator[str]:
    """Yield what a configuration says of sizes that every verifier has and that cannot be."""
    text = config.get_text_config()
    for name in SIZES:
        value = getattr(text, name, None)
        if not isinstance(value, int) or value < 1:
            yield f"{name} must be a positive integer, not {value!r}"
        elif name == "num_hidden_layers" and value > MOST_LAYERS:
            yield f"{name} is {value:,}; at most {MOST_LAYERS:,} are allowed"
    if not isinstance(text.dtype, torch.dtype | None):
        yield f"dtype must be a type of torch such as 'bfloat16', not {text.dtype!r}"


def why_not_built(config: PreTrainedConfig, build: Build, error: BaseException) -> str:
    """Say why a model cannot be built, with the keys that the family's defaults in their place would mend.

    Args:
        config: The configuration.
        build: Makes a model without values of it, or fails.
        error: How it failed.
    """
    keys = [f"{key} {value!r}" for key, value in _values(config) if _builds(_without(config, key), build)]
    named = f" (look at {', '.join(keys)})" if keys else ""
    return f"no model can be built from it: {reason_of(error)}{named}"


def why_not_fitting(config: PreTrainedConfig, build: Build, name_or_path: str, revision: str | None) -> str | None:
    """Say which weight is not in a checkpoint, or has another shape, and the keys that decide that.

    Args:
        config: The configuration.
        build: Makes a model without values of it.
        name_or_path: Folder or hub id of the checkpoint.
        revision: Branch, tag or commit on the hub.

    Returns:
        One sentence; None where all weights fit.
    """
    from specforge.verifier.parts import WEIGHTS, files_of

    found: dict[str, list[int]] = {}
    for file_name in sorted(set(files_of(name_or_path, revision).values())) or [WEIGHTS]:
        with safe_open(find_file(name_or_path, file_name, revision=revision), framework="pt") as file:
            found |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = _shapes(build(config))
    for name, shape in expected.items():
        if name not in found or found[name] == shape:
            continue
        keys = ", ".join(_deciding(config, build, name, shape))
        return f"{name} is {found[name]} in the weights, but {shape} by {keys or 'the configuration'}"
    # Tied weights are stored once.
    missing = [name for name in expected if name not in found]
    for name in missing:
        if keys := _deciding(config, build, name, expected[name]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            return f"the weights lack {name}{more}, which it asks for by {', '.join(keys)}"
    return None


def _values(config: PreTrainedConfig) -> list[tuple[str, Any]]:
    """Return what a configuration says beyond its family's defaults, of the text."""
    text = config.get_text_config()
    said = text.to_diff_dict() if text is config else text.to_dict()
    unsaid = ("model_type", "architectures", "transformers_version", "dtype")
    return [(key, value) for key, value in said.items() if key not in unsaid]


def _is_read(values: Mapping[str, Any]) -> bool:
    try:
        return AutoConfig.for_model(**values) is not None
    except Exception:
        return False


def _without(config: PreTrainedConfig, key: str) -> PreTrainedConfig | None:
    return _remade(config, {name: value for name, value in config.get_text_config().to_dict().items() if name != key})


def _remade(config: PreTrainedConfig, values: dict[str, Any]) -> PreTrainedConfig | None:
    """Make a configuration with other values of the text; None where that is refused."""
    text = config.get_text_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = type(text).from_dict(values)
            if text is config:
                return made
            whole = copy.deepcopy(config)
            whole.text_config = made
            return whole
        except Exception:
            return None


def _builds(config: PreTrainedConfig | None, build: Build) -> bool:
    try:
        return config is not None and build(config) is not None
    except Exception:
        return False


def _shapes(model: PreTrainedModel) -> Mapping[str, list[int]]:
    """Return the shape of each weight of a model, by the name that it has in files."""
    stored = revert_weight_conversion(model, model.state_dict())
    return {name: list(one.shape) for name, one in stored.items()}


def _deciding(config: PreTrainedConfig, build: Build, name: str, shape: list[int]) -> list[str]:
    """Return the keys that decide whether a weight is there, and its shape: those whose change changes it."""
    values = config.get_text_config().to_dict()
    keys = []
    for key, value in values.items():
        if not isinstance(value, int):
            continue
        other = not value if isinstance(value, bool) else value // 2 if value > 1 else 2
        changed = _remade(config, {**values, key: other})
        try:
            if changed is not None and _shapes(build(changed)).get(name) != shape:
                keys.append(f"{key} {value!r}")
        except Exception:  # such a model cannot be
            continue
    return keys
