"""The settings of a parser as a person would describe them: values, default and meaning of each key."""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from specforge.private.argparse import actions, restriction_of, type_of

NULL = "null"
WORDS = {"int": "integer", "float": "number", "str": "text", "bool": "true or false", "NoneType": NULL}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
# Upper bounds from here on only keep arithmetic exact.
NO_BOUND = 1e6

Bound = tuple[str, float]


@dataclass(frozen=True)
class Setting:
    """A key of a configuration.

    Attributes:
        key: Its path, such as ``model.optimizer.lr``.
        values: What it may be, in words.
        default: Its default as in a YAML file; None if the key is required.
        meaning: What it does.
    """

    key: str
    values: str
    default: str | None
    meaning: str


def settings(parser: ArgumentParser) -> Iterator[Setting]:
    """Yield the settings of a parser in order, those of optional groups of keys after their group."""
    for action in filter(_is_setting, actions(parser)):
        yield _setting(action.dest, type_of(action), action.default, action.help)
        for group in get_args(type_of(action)):
            if _is_group(group):
                for name, field in group.model_fields.items():
                    yield _setting(f"{action.dest}.{name}", _hint(field), field.default, field.description)


def _is_setting(action: Action) -> bool:
    """Tell whether an argument is a key of its own, neither one that follows another nor one that asks for help."""
    return type(action).__name__ == "ActionTypeHint"


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _setting(key: str, hint: Any, default: Any, meaning: str | None) -> Setting:
    values = describe_values(hint)
    # The parser hides while it prints help which keys are required.
    required = default is PydanticUndefined or (default is None and NULL not in values)
    text = " ".join((meaning or "").replace("``", "").split())
    return Setting(key, values, None if required else _as_yaml(default), text)


def _hint(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _as_yaml(value: Any) -> str:
    if (path := getattr(value, "class_path", None)) is not None:
        return str(path.rpartition(".")[2])
    if isinstance(value, float):
        return str(value)  # as it is written in code; YAML would write 1.0e-05
    plain = list(value) if isinstance(value, tuple) else value
    try:
        text: str = yaml.safe_dump(plain, default_flow_style=True, width=1000)
    except yaml.YAMLError:  # an object of a plugin
        return str(value)
    return text.removesuffix("...\n").strip()


def describe_values(hint: Any) -> str:
    """Describe a type in words: its names, bounds, or the words that it allows."""
    *others, last = dict.fromkeys(_alternatives(hint, []))
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(hint: Any, bounds: list[Bound]) -> list[str]:
    inner, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        return _alternatives(inner[0], [*bounds, *_bounds(inner[1:])])
    if origin is Literal:
        return [str(one) for one in inner]
    if origin is dict or _is_group(hint):
        return ["keys and values"]
    if origin in (list, tuple):
        return [f"list of {_alternatives(inner[0], [])[0].partition(' ')[0]}s"]
    if inner:
        return [word for one in inner for word in _alternatives(one, bounds)]
    if restriction := restriction_of(hint):
        number, expression = restriction
        own = [(sign, float(bound)) for sign, bound in re.findall(r"v([<>]=?)(\S+)", expression)]
        return [_within(WORDS[number.__name__], own)]
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    return [_within(WORDS.get(name, name), bounds if name != "NoneType" else [])]


def _bounds(metadata: tuple[Any, ...]) -> Iterator[Bound]:
    for one in metadata:
        yield from _bounds(tuple(getattr(one, "metadata", ())))
        bounds = ((sign, getattr(one, name, None)) for name, sign in SIGNS.items())
        yield from ((sign, bound) for sign, bound in bounds if bound is not None)


def _within(name: str, bounds: list[Bound]) -> str:
    """Add the tightest lower and upper bound."""
    lower = [one for one in bounds if one[0].startswith(">")]
    upper = [one for one in bounds if one[0].startswith("<") and one[1] < NO_BOUND]
    tightest = [
        *sorted(lower, key=lambda one: (-one[1], one[0]))[:1],
        *sorted(upper, key=lambda one: (one[1], one[0]))[:1],
    ]
    words = " and ".join(f"{sign} {bound:g}" for sign, bound in tightest)
    return f"{name} {words}".rstrip()
