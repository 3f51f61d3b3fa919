"""Turning the parser's errors into one message: the key, where it stands, what is allowed, the nearest right name."""

from __future__ import annotations

import re

import yaml
from jsonargparse import ArgumentParser, Namespace
from pydantic import ValidationError

from specforge.errors import UsageError, nearest_name
from specforge.training.config_files import config_files

# What pydantic adds around the sentence that matters.
NOISE = (
    r"^Value error, ",
    r"\d+ validation errors? for \S+",
    r"For further information visit \S+",
    r"\[type=[^\]]*\]",
)


def explain(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    """Rewrite an error of the parser for the person who wrote the configuration.

    Args:
        message: What the parser said.
        parser: It knows the right names.
        arguments: The words of the command line.
    """
    unknown = _unknown_key(message)
    if unknown is not None:
        return f"unknown key {unknown!r}{_place(unknown, arguments)}.{_nearest(unknown, known_keys(parser))}"
    match = re.match(r'Parser key "(?P<key>[^"]+)":\s*(?P<reason>.*)', message, re.DOTALL)
    if match:
        reason = _reason(match["reason"])
        if reason.endswith("got 'None'"):
            reason = f"is required; give it in the configuration file or as --{match['key']}"
        return f"{match['key']}: {reason}{_place(match['key'], arguments)}"
    return " ".join(message.split())


def explain_settings(error: ValidationError, parser: ArgumentParser) -> str:
    """Say which group of keys holds settings that do not go together."""
    groups = (
        one.dest for one in parser._actions if getattr(getattr(one, "basetype", None), "__name__", "") == error.title
    )
    return f"{next(groups, error.title)}: {'; '.join(_reason(fault['msg']) for fault in error.errors())}"


def check_groups(config: Namespace, parser: ArgumentParser) -> None:
    """Refuse a plain value where a group of keys belongs, which the parser lets through.

    Raises:
        UsageError: With the group's key and the value.
    """
    for action in parser._actions:
        if hasattr(action, "basetype") and not isinstance(value := config.get(action.dest), Namespace):
            raise UsageError(f"{action.dest}: expected keys and values, got {value!r}")


def known_keys(parser: ArgumentParser) -> list[str]:
    """Return the paths of all keys that a configuration may hold."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]


def _unknown_key(message: str) -> str | None:
    for pattern in (
        r"[Uu]nrecognized arguments: --(?P<key>[^\s=]+)",
        r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'",
        r"(?:Option|Key) ['\"](?P<key>[^'\"]+)['\"] is not (?:accepted|expected)",
    ):
        match = re.search(pattern, message)
        if match:
            group = match.groupdict().get("group")
            return f"{group}.{match['key']}" if group else match["key"]
    return None


def _nearest(key: str, allowed: list[str]) -> str:
    """Suggest a name for the first part of the key's path that is wrong."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        inside = [one.removeprefix(f"{parent}.") for one in allowed if not parent or one.startswith(f"{parent}.")]
        names = sorted({one.split(".")[0] for one in inside})
        if names and part not in names:
            hint = nearest_name(part, names)
            prefix = f"{parent}." if parent else ""
            return (
                hint.replace(" '", f" '{prefix}", 1) or f" Allowed in {parent or 'a configuration'}: {', '.join(names)}"
            )
    return ""


def _reason(text: str) -> str:
    """Condense pydantic's and jsonargparse's explanations to one line."""
    # One given value after one or several types that it could have had.
    got = re.search(r"(?:Got value|got|Given value): (.*)", text, re.DOTALL)
    value = f", got {got[1].strip()!r}" if got else ""
    expected = dict.fromkeys(_plain_type(one) for one in re.findall(r"Expected an? ((?:typing\.|<).*?[\]>])", text))
    if expected:
        return f"expected {' or '.join(expected)}{value}"
    restricted = re.search(r"Not of type \w+: (.*) does not conform to restriction v(.*)", text, re.DOTALL)
    if restricted:
        return f"must be {restricted[2].strip().replace('and v', 'and ')}, got {restricted[1]}"
    for noise in NOISE:
        text = re.sub(noise, "", text.partition("Got value")[0])
    return " ".join(text.split()).rstrip(". ") + value


def _plain_type(text: str) -> str:
    if "Literal[" in text:
        return " or ".join(re.findall(r"[\w.+-]+", text.partition("Literal")[2]))
    names = {"NoneType": "null", "int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}
    name = re.sub(r"<class '([^']+)'>", r"\1", text)
    return {**names, "dict": "keys and values", "list": "a list"}.get(name, name)


def _place(key: str, arguments: list[str]) -> str:
    """Return `` (FILE:LINE)`` where a configuration file sets the key; empty where a flag does, or nothing."""
    if any(word.split("=")[0] == f"--{key}" for word in arguments):
        return ""
    for path in reversed(config_files(arguments)):
        line = _line_of(key.split("."), yaml.compose(path.read_text(encoding="utf-8")))
        if line is not None:
            return f" ({path}:{line})"
    return ""


def _line_of(parts: list[str], node: yaml.Node | None) -> int | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == parts[0]:
            return name.start_mark.line + 1 if len(parts) == 1 else _line_of(parts[1:], value)
    return None
