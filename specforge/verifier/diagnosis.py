"""Why a verifier's ``config.json`` does not make a model, or not the one that its weights are of: by the key."""

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

# How long it is looked for the keys that are to blame.
SECONDS = 10.0

T = TypeVar("T")
Build = Callable[[PreTrainedConfig], PreTrainedModel]


def reason_of(error: BaseException) -> str:
    """Return what an error says, in one line; of a field that transformers refuses, what is allowed."""
    # Some list all model types that there are.
    lines = [line.strip()[:300] for line in str(error).splitlines() if line.strip()]
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
    blamed = [(path, value) for path, value in _paths(values) if _is_read(_without(values, path))]
    named = _named(blamed)
    return f"{named}: {reason}" if named else reason


def field_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a ``config.json`` says with a wrong type, of fields that transformers does not check."""
    classes = values.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(one, str) for one in classes)):
        yield f"architectures must be a list of class names, not {classes!r}"


def size_faults(config: PreTrainedConfig) -> Iterator[str]:
    """Yield what a configuration says of sizes and numbers of parts that cannot be."""
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
        yield f"dtype must be a type of torch such as 'bfloat16', not {text.dtype!r}"


def why_not_built(config: PreTrainedConfig, build: Build, error: BaseException) -> str:
    """Say why a model cannot be built, with the keys that the family's defaults in their place would mend.

    Args:
        config: The configuration.
        build: Makes a model without values of it, or fails.
        error: How it failed.
    """
    text = config.get_text_config()
    if "padding_idx" in str(error).lower():
        return f"pad_token_id {text.pad_token_id!r} is no token of a vocabulary of {text.vocab_size} (vocab_size)"
    blamed = []
    for path, value in _in_time(_paths(config.to_diff_dict())):
        changed = _changed(config, path)
        if changed is not None and _differs(changed, build, lambda _: True):
            blamed.append((path, value))
    named = f" (look at {_named(blamed)})" if blamed else ""
    return f"no model can be built from it: {reason_of(error)}{named}"


def why_not_fitting(
    config: PreTrainedConfig, build: Build, found: Mapping[str, Sequence[int]], missing: Collection[str] = ()
) -> str | None:
    """Say which weight is not in a checkpoint, or has another shape, and the keys that decide that.

    Args:
        config: The configuration.
        build: Makes a model without values of it.
        found: Shapes of all weights in the files, by name.
        missing: Weights that the model would have had to have.

    Returns:
        One sentence; None where all weights fit.
    """
    expected = _shapes(build(config))
    for name, shape in expected.items():
        if name in found and list(found[name]) != shape:
            keys = _deciding(config, build, lambda shapes: shapes.get(name) != shape)  # noqa: B023  (used at once)
            return f"{name} is {list(found[name])} in the weights, but {shape} by {keys or 'the configuration'}"
    # The last of a kind is the one that a number decides.
    if lacking := [name for name in expected if name in missing]:
        keys = _deciding(config, build, lambda shapes: lacking[-1] not in shapes)
        return f"it asks for {lacking[-1]}, which the weights do not have, by {keys or 'its family'}"
    return None


def _deciding(config: PreTrainedConfig, build: Build, differs: Callable[[Mapping[str, list[int]]], bool]) -> str:
    """Return the keys whose change makes a difference to the weights, with their values."""
    keys = []
    for path, value in _in_time(_paths(config.to_dict())):
        if not isinstance(value, int):
            continue
        others = [not value] if isinstance(value, bool) else [value // 2, 1] if value > 1 else [2]
        made = (_changed(config, path, other) for other in others)
        if any(one is not None and _differs(one, build, differs) for one in made):
            keys.append(f"{'.'.join(path)} {value!r}")
    return ", ".join(keys)


def _paths(values: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each key with its value; those inside others after them."""
    for key, value in values.items():
        yield (*before, key), value
        if isinstance(value, dict):
            yield from _paths(value, (*before, key))


def _in_time(items: Iterator[T]) -> Iterator[T]:
    """Yield items for some seconds: of large models, each is tried for a while."""
    end = time.monotonic() + SECONDS
    return takewhile(lambda _: time.monotonic() < end, items)


def _named(blamed: Sequence[tuple[tuple[str, ...], Any]]) -> str:
    """Name keys with their values; where one inside another is to blame, that one."""
    paths = [path for path, _ in blamed]
    deepest = [one for one in blamed if not any(path[: len(one[0])] == one[0] != path for path in paths)]
    return ", ".join(f"{'.'.join(path)} {value!r:.80}" for path, value in deepest)


def _without(values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Copy nested values without one of them."""
    key, *rest = path
    if not rest:
        return {name: value for name, value in values.items() if name != key}
    return {**values, key: _without(values.get(key) or {}, tuple(rest))}


def _changed(config: PreTrainedConfig, path: tuple[str, ...], value: Any = None) -> PreTrainedConfig | None:
    """Make a configuration with another value somewhere, or without one; None where that is refused."""
    values = _without(config.to_dict(), path)
    if value is not None:
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    try:
        return type(config).from_dict(values)
    except Exception:  # each family checks its fields in ways of its own
        return None


def _differs(config: PreTrainedConfig, build: Build, differs: Callable[[Mapping[str, list[int]]], bool]) -> bool:
    try:
        return differs(_shapes(build(config)))
    except Exception:  # no such model can be built
        return False


def _is_read(values: Mapping[str, Any]) -> bool:
    try:
        return AutoConfig.for_model(**values) is not None
    except Exception:
        return False


def _shapes(model: PreTrainedModel) -> Mapping[str, list[int]]:
    """Return the shape of each weight of a model, by the name that it has in files."""
    stored = revert_weight_conversion(model, model.state_dict())
    return {name: list(one.shape) for name, one in stored.items()}
