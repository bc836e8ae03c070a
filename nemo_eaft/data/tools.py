"""Functions and calls of them in the one form that chat templates take, from the several that data sets have."""

from __future__ import annotations

import json
from typing import Any

from nemo_eaft.data.rows import RowError


def parsed(value: Any, name: str) -> Any:
    """The value, or what its JSON text says.

    Raises:
        RowError: text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name!r} is text, but not JSON: {error}") from error


def without_nulls(value: Any) -> Any:
    """The value without the keys whose value is null, at any depth; nulls in lists stay. A struct column gives the
    functions of one row the parameters of all others, as nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def tools(value: Any, name: str) -> list[dict[str, Any]] | None:
    """The functions of a row as ``{"type": "function", "function": {"name", ...}}`` without nulls; None: no functions.

    A struct column sorts the keys of its values. Those of a function are put in the order that templates show; of the
    parameters the order is not known and stays.

    Args:
        value: null, a list of functions, each an object or JSON text, with or without the wrapping, or all of that as
            JSON text.
        name: the column, for messages.

    Raises:
        RowError: anything else.
    """
    value = parsed(value, name) if value != "" else None
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(f"{name!r} must be a list of functions, got {type(value).__name__}")
    found = []
    for number, tool in enumerate((without_nulls(parsed(tool, name)) for tool in value), start=1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{name!r}: function {number} must be an object with a 'name'")
        wrapped = tool if "function" in tool else {}
        found.append({"type": "function", "function": _in_order(function)} | _without(wrapped, "function"))
    return found


def _in_order(function: dict[str, Any]) -> dict[str, Any]:
    first = ("name", "description", "parameters")
    return {key: function[key] for key in first if key in function} | _without(function, *first)


def _without(value: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in keys}


def tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls as ``{"type": "function", "function": {"name", "arguments": {...}}}``.

    Args:
        value: one call or a list of them, with or without the wrapping, or that as JSON text. Arguments are an object
            or its JSON text.
        where: what holds it, for messages.

    Raises:
        RowError: anything else.
    """
    value = parsed(value, f"{where}: tool_calls")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: a call must be an object with 'name' and 'arguments'")
        arguments = parsed(function.get("arguments") or {}, f"{where}: arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"{where}: the arguments of {function['name']} must be an object, got {arguments!r}")
        kept = {key: item for key, item in call.items() if key not in ("name", "arguments")}
        calls.append(kept | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls
