"""Tools and the calls of them, in the form of OpenAI's API, from each of the forms in which data sets hold them."""

from __future__ import annotations

import json
from typing import Any

from specforge.data.text.bad_rows import BadRow

_CALL_KEYS = ("name", "arguments", "parameters")  # of a bare call; others, such as its id, are beside the function


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects, at every depth.

    Arrow gives each object the fields of all others in its column, and fills them with null. Elements of lists stay.
    """
    if isinstance(value, dict):
        return {key: one if type(one) is str else without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def parsed(value: Any) -> Any:
    """Return what a string holds as JSON, or the value as it is: no string, or no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # also a number of thousands of digits, thousands of brackets
        return value


def read_tools(value: Any, location: str) -> list[dict[str, Any]] | None:
    """Return descriptions of tools as ``{"type": "function", "function": {...}}``; None if there are none.

    Args:
        value: A list or a JSON string of one. A tool may itself be a JSON string, and may be a bare function.
        location: Of the row.

    Raises:
        BadRow: The value is no list of tools that have a name.
    """
    tools = parsed(without_nulls(value))  # in this order: nulls in a JSON string are there on purpose
    if tools is None or tools == "" or tools == {}:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise BadRow(
            location, "malformed tools", f"'tools' must be a list or a JSON string of one, found {_kind(tools)}"
        )
    return [_read_tool(parsed(tool), location) for tool in tools] or None


def read_tool_calls(value: Any, location: str, where: str) -> list[dict[str, Any]]:
    """Return the calls of an assistant's turn as ``{"type": "function", "function": {"name": ..., "arguments": ...}}``.

    The arguments are an object wherever they can be read as one: a JSON string of an object is parsed, and missing or
    empty arguments are an empty object. A string that holds anything else stays as it is. Other keys, such as ``id``,
    are kept.

    Args:
        value: A call, a list of calls, or a JSON string of either. A call may be a bare function.
        location: Of the row.
        where: The turn, such as ``message 3``.

    Raises:
        BadRow: The value is something else, or a call has no name.
    """
    calls = parsed(value)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise BadRow(location, "malformed tool call", f"{where}: a tool call must be an object, found {_kind(calls)}")
    return [_read_call(parsed(call), location, where) for call in calls]


def _read_tool(tool: Any, location: str) -> dict[str, Any]:
    wrapped = _wrapped(tool)
    if wrapped is None:
        raise BadRow(
            location,
            "malformed tools",
            f"'tools' holds {tool!r:.80}; a tool is an object {{'type': 'function', 'function': {{'name': ...}}}}",
        )
    function = wrapped["function"]
    # A column of schemas that differ is often stored as JSON strings.
    parameters = parsed(function.get("parameters"))
    return {**wrapped, "function": {**function, "parameters": parameters}} if isinstance(parameters, dict) else wrapped


def _read_call(call: Any, location: str, where: str) -> dict[str, Any]:
    wrapped = _wrapped(call, _CALL_KEYS)
    if wrapped is None:
        raise BadRow(
            location,
            "malformed tool call",
            f"{where}: the tool call {call!r:.80} must be an object "
            "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}",
        )
    function = wrapped["function"]
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments is None or arguments == "" else arguments
    if isinstance(arguments, str) and isinstance(read := parsed(arguments), dict):
        arguments = read
    named = {key: value for key, value in function.items() if key != "parameters"}
    return {**wrapped, "function": {**named, "arguments": arguments}}


def _wrapped(value: Any, function_keys: tuple[str, ...] | None = None) -> dict[str, Any] | None:
    """Return a function as the API wraps it; None if it is none.

    Args:
        value: What a row holds.
        function_keys: Keys of a bare function that are the function's own; None for all.
    """
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        # In the order of the row: a template may print a call as it is.
        wrapped = value if "type" in value else {"type": "function", **value}
    else:
        bare = {key: one for key, one in value.items() if key != "type"}
        function = {key: one for key, one in bare.items() if function_keys is None or key in function_keys}
        wrapped = {**{key: bare[key] for key in bare if key not in function}, "type": "function", "function": function}
    name = wrapped["function"].get("name")
    return wrapped if isinstance(name, str) and name.strip() else None


def _kind(value: Any) -> str:
    return "a text that is no JSON" if isinstance(value, str) else type(value).__name__
