"""Turning the parser's errors into one message: the key, where it stands, what is allowed, the nearest right name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from specforge.errors import nearest_name


def explain(message: str, parser: ArgumentParser, files: Iterable[Path]) -> str:
    """Rewrite an error of the parser for the person who wrote the configuration.

    Args:
        message: What the parser said.
        parser: It knows the right names.
        files: The configuration files, in order.
    """
    unknown = _unknown_key(message)
    if unknown is not None:
        allowed = known_keys(parser)
        place = _place(unknown, files)
        return f"unknown key {unknown!r}{place}.{_nearest(unknown, allowed)}"
    match = re.match(r'(?:error: )?Parser key "(?P<key>[^"]+)":\s*(?P<reason>.*)', message, re.DOTALL)
    if match:
        key = match["key"]
        return f"{key}: {_reason(match['reason'])}{_place(key, files)}"
    match = re.match(r'Key "(?P<key>[^"]+)" is required', message)
    if match:
        return f"{match['key']} is required; give it in the configuration file or as --{match['key']}"
    return " ".join(message.split())


def known_keys(parser: ArgumentParser) -> list[str]:
    """Return the paths of all keys that a configuration may hold."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]


def _unknown_key(message: str) -> str | None:
    for pattern in (
        r"unrecognized arguments: --(?P<key>[^\s=]+)",
        r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'",
        r"(?:Option|Key) ['\"](?P<key>[^'\"]+)['\"] is not (?:accepted|expected)",
        r"does not accept (?:nested )?(?:option|key) ['\"](?P<key>[^'\"]+)['\"]",
    ):
        match = re.search(pattern, message)
        if match:
            group = match.groupdict().get("group")
            return f"{group}.{match['key']}" if group else match["key"]
    return None


def _nearest(key: str, allowed: list[str]) -> str:
    parent, _, name = key.rpartition(".")
    siblings = {one.removeprefix(f"{parent}."): one for one in allowed if one.rpartition(".")[0] == parent}
    hint = nearest_name(name, siblings) or nearest_name(key, allowed)
    if hint:
        return hint if not parent or "'" + parent in hint else hint.replace("'", f"'{parent}.", 1)
    shown = sorted(siblings) or sorted({one.split(".")[0] for one in allowed})
    return f" Allowed {'in ' + parent if siblings and parent else 'are'}: {', '.join(shown)}"


def _reason(text: str) -> str:
    """Condense pydantic's and jsonargparse's explanations to one line."""
    if "Union subtypes" in text:
        expected = re.findall(r"Expected an? (.+)", text)
        value = re.search(r"Given value: (.*)", text, re.DOTALL)
        kinds = " or ".join(dict.fromkeys(_plain_type(one) for one in expected)) or "another type"
        return f"expected {kinds}, got {value[1].strip() if value else '?'!s}"
    text = re.sub(r"\d+ validation errors? for \S+", "", text)
    text = re.sub(r"For further information visit \S+", "", text)
    text = re.sub(r"\[type=[^\]]*\]\s*\.?", "", text)
    return " ".join(text.split()).replace(" . Got value", ", got").replace(". Got value", ", got")


def _plain_type(text: str) -> str:
    name = re.sub(r"<class '([^']+)'>", r"\1", text).strip()
    return {"NoneType": "null", "int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}.get(
        name, name
    )


def _place(key: str, files: Iterable[Path]) -> str:
    """Return `` (FILE:LINE)`` where a configuration file sets the key, the last one winning; else an empty string."""
    place = ""
    for path in files:
        line = _line_of(key.split("."), yaml.compose(path.read_text(encoding="utf-8")))
        if line is not None:
            place = f" ({path}:{line})"
    return place


def _line_of(parts: list[str], node: yaml.Node | None) -> int | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == parts[0]:
            return name.start_mark.line + 1 if len(parts) == 1 else _line_of(parts[1:], value)
    return None
