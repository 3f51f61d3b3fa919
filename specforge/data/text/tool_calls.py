"""Tools and tool calls, normalised from the forms found in data sets to that of OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

from specforge.data.text.bad_rows import BadRow

_CALL_KEYS = (
    "name",
    "arguments",
    "parameters",
)  # keys of a bare call's function; others, such as its id, belong to the call


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects, at every depth.

    Arrow gives each object the fields of all objects in its column and fills missing ones with null. List elements
    are kept.
    """
    if isinstance(value, dict):
        return {key: one if type(one) is str else without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def parsed(value: Any) -> Any:
    """Return a string parsed as JSON; a value that is not a string or not JSON is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # also a number with thousands of digits, thousands of brackets
        return value


def read_tools(value: Any, location: str) -> list[dict[str, Any]] | None:
    """Return tool descriptions as ``{"type": "function", "function": {...}}``; None if there are none.

    Args:
        value: A list or a JSON string of one. Each tool may be a JSON string or a bare function.
        location: Location of the row.

    Raises:
        BadRow: The value is not a list of tools with names.
    """
    tools = parsed(without_nulls(value))  # in this order: nulls inside a JSON string are intended
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
    """Return the calls of an assistant turn as ``{"type": "function", "function": {"name": ..., "arguments": ...}}``.

    Arguments become an object if possible: a JSON string of an object is parsed, and missing or empty arguments become
    an empty object. Any other string is kept unchanged. Other keys, such as ``id``, are kept.

    Args:
        value: A call, a list of calls, or a JSON string of either. A call may be a bare function.
        location: Location of the row.
        where: Name of the turn, such as ``message 3``.

    Raises:
        BadRow: The value has another form, or a call has no name.
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
    # Columns of differing schemas are often stored as JSON strings.
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
    """Return a function in the wrapped form of the API; None if the value is not a named function.

    Args:
        value: The row's value.
        function_keys: Keys of a bare function that belong into ``function``; None for all.
    """
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        # Keep the key order of the row: a template may print a call verbatim.
        wrapped = value if "type" in value else {"type": "function", **value}
    else:
        bare = {key: one for key, one in value.items() if key != "type"}
        function = {key: one for key, one in bare.items() if function_keys is None or key in function_keys}
        wrapped = {**{key: bare[key] for key in bare if key not in function}, "type": "function", "function": function}
    name = wrapped["function"].get("name")
    return wrapped if isinstance(name, str) and name.strip() else None


def _kind(value: Any) -> str:
    return "a text that is not JSON" if isinstance(value, str) else type(value).__name__
