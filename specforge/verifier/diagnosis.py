"""Diagnosing a verifier's ``config.json``: the keys for which no model can be built or the weights do not fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from specforge.errors import nearest_name

MOST_LAYERS = 1000
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")

# Time limit of the search for the responsible keys.
SECONDS = 10.0

T = TypeVar("T")
Build = Callable[[PreTrainedConfig], PreTrainedModel]


def reason_of(error: BaseException) -> str:
    """Return an error as one line; for a field that transformers refuses, what is allowed."""
    # Some messages list all model types.
    lines = [line.strip()[:300] for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith(("Validation error for field", "Class validation error")):
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0] if lines else type(error).__name__


def why_not_read(values: Mapping[str, Any], error: BaseException) -> str:
    """Explain why transformers refuses a ``config.json``, naming the keys without which it would not.

    Args:
        values: The parsed file.
        error: The error of reading it.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = nearest_name(str(model_type), CONFIG_MAPPING.keys())
        return f"model_type: transformers does not know {model_type!r}.{hint}"
    reason = reason_of(error)
    if any(f"'{key}'" in reason for key in values):
        return reason
    blamed = [(path, value) for path, value in _paths(values) if _is_readable(_without(values, path))]
    named = _named(blamed)
    return f"{named}: {reason}" if named else reason


def field_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield fields of a ``config.json`` with a wrong type that transformers does not check."""
    classes = values.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(one, str) for one in classes)):
        yield f"architectures must be a list of class names, not {classes!r}"


def size_faults(config: PreTrainedConfig) -> Iterator[str]:
    """Yield impossible sizes and counts in a configuration."""
    text = config.get_text_config()
    for name in SIZES:
        value = getattr(text, name, None)
        if not isinstance(value, int) or value < 1:
            yield f"{name} must be a positive integer, not {value!r}"
        elif name == "num_hidden_layers" and value > MOST_LAYERS:
            yield f"{name} is {value:,}; at most {MOST_LAYERS:,} are allowed"
    for path, value in _paths(config.to_dict()):
        name = str(path[-1])
        if name.startswith("num_") and name not in SIZES and isinstance(value, int) and value < 0:
            yield f"{'.'.join(path)} must not be negative, but is {value}"
    if not isinstance(text.dtype, torch.dtype | None):
        yield f"dtype must be a torch dtype such as 'bfloat16', not {text.dtype!r}"


def why_not_built(config: PreTrainedConfig, build: Build, error: BaseException) -> str:
    """Explain why a model cannot be built, naming the keys for which the family's defaults would fix it.

    Args:
        config: The configuration.
        build: Builds a model on the meta device from it, or fails.
        error: The error of building it.
    """
    text = config.get_text_config()
    if "padding_idx" in str(error).lower():
        return f"pad_token_id {text.pad_token_id!r} is outside the vocabulary of {text.vocab_size} (vocab_size)"
    blamed = []
    for path, value in _in_time(_paths(config.to_diff_dict())):
        changed = _changed(config, path)
        if changed is not None and _differs(changed, build, lambda _: True):
            blamed.append((path, value))
    named = f" (check {_named(blamed)})" if blamed else ""
    return f"no model can be built from it: {reason_of(error)}{named}"


def why_not_fitting(
    config: PreTrainedConfig, build: Build, found: Mapping[str, Sequence[int]], missing: Collection[str] = ()
) -> str | None:
    """Explain which weight is missing in a checkpoint or has another shape, and which keys decide that.

    Args:
        config: The configuration.
        build: Builds a model on the meta device from it.
        found: Shapes of all weights in the files, by name.
        missing: Weights of the model that the checkpoint lacks.

    Returns:
        One sentence; None if all weights fit.
    """
    expected = _shapes(build(config))
    for name, shape in expected.items():
        if name in found and list(found[name]) != shape:
            keys = _responsible_keys(config, build, lambda shapes: shapes.get(name) != shape)  # noqa: B023  (used at once)
            return (
                f"{name} is {list(found[name])} in the weights, but {shape} according to {keys or 'the configuration'}"
            )
    # A count decides the last of several similar weights.
    if lacking := [name for name in expected if name in missing]:
        keys = _responsible_keys(config, build, lambda shapes: lacking[-1] not in shapes)
        return f"it needs {lacking[-1]}, which the weights lack, according to {keys or 'its family'}"
    return None


def _responsible_keys(
    config: PreTrainedConfig, build: Build, differs: Callable[[Mapping[str, list[int]]], bool]
) -> str:
    """Return the keys whose change alters the weights, with their values."""
    keys = []
    for path, value in _in_time(_paths(config.to_dict())):
        if not isinstance(value, int):
            continue
        others = [not value] if isinstance(value, bool) else [value // 2, 1] if value > 1 else [2]
        variants = (_changed(config, path, other) for other in others)
        if any(one is not None and _differs(one, build, differs) for one in variants):
            keys.append(f"{'.'.join(path)} {value!r}")
    return ", ".join(keys)


def _paths(values: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each key path with its value; nested keys follow their parent."""
    for key, value in values.items():
        yield (*before, key), value
        if isinstance(value, dict):
            yield from _paths(value, (*before, key))


def _in_time(items: Iterator[T]) -> Iterator[T]:
    """Yield items until the time limit: for large models, each trial takes long."""
    end = time.monotonic() + SECONDS
    return takewhile(lambda _: time.monotonic() < end, items)


def _named(blamed: Sequence[tuple[tuple[str, ...], Any]]) -> str:
    """Format keys with their values; of nested keys, only the innermost."""
    paths = [path for path, _ in blamed]
    deepest = [one for one in blamed if not any(path[: len(one[0])] == one[0] != path for path in paths)]
    return ", ".join(f"{'.'.join(path)} {value!r:.80}" for path, value in deepest)


def _without(values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return a copy of nested values without one of them."""
    key, *rest = path
    if not rest:
        return {name: value for name, value in values.items() if name != key}
    return {**values, key: _without(values.get(key) or {}, tuple(rest))}


def _changed(config: PreTrainedConfig, path: tuple[str, ...], value: Any = None) -> PreTrainedConfig | None:
    """Return a configuration with one value changed or removed; None if it is refused."""
    values = _without(config.to_dict(), path)
    if value is not None:
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    try:
        return type(config).from_dict(values)
    except Exception:  # each family checks its fields in its own way
        return None


def _differs(config: PreTrainedConfig, build: Build, differs: Callable[[Mapping[str, list[int]]], bool]) -> bool:
    try:
        return differs(_shapes(build(config)))
    except Exception:  # no such model can be built
        return False


def _is_readable(values: Mapping[str, Any]) -> bool:
    try:
        return AutoConfig.for_model(**values) is not None
    except Exception:
        return False


def _shapes(model: PreTrainedModel) -> Mapping[str, list[int]]:
    """Return the shape of each weight of a model, by its name in checkpoint files."""
    stored = revert_weight_conversion(model, model.state_dict())
    return {name: list(one.shape) for name, one in stored.items()}
