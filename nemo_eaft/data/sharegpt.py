"""ShareGPT's turns, ``{"from", "value"}``, as messages, ``{"role", "content"}``."""

from __future__ import annotations

from typing import Any

from nemo_eaft.data.rows import RowError
from nemo_eaft.data.tools import tool_calls

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""``from`` -> role. The value of ``function_call`` is the call, or a list of calls, as JSON text."""


def to_messages(turns: Any, column: str) -> list[dict[str, Any]]:
    """The turns of a row as messages.

    Raises:
        RowError: naming the turn, counted from 1.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{column!r} must be a list of at least one turn")
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def _message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        has = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
        raise RowError(
            f"turn {number} must be an object with 'from' and 'value', it has {has or 'nothing'} "
            f"(data.mapping=messages reads 'role' and 'content')"
        )
    speaker, value = turn["from"], turn["value"]
    if speaker not in ROLES:
        raise RowError(f"turn {number} is from {speaker!r}; known are {', '.join(ROLES)}")
    if not isinstance(value, str):
        raise RowError(f"turn {number}: 'value' must be text, got {type(value).__name__}")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": tool_calls(value, f"turn {number}")}
    return {"role": ROLES[speaker], "content": value}
