"""Whether a chat template writes all that a row holds.

A template passes over what it does not know: SmolLM2's over functions and calls, Qwen2.5's over roles of others. What
it leaves out would be neither read nor learnt, and nothing would say so. Here the row is written once more with a mark
at the end of every text and name: what has no mark in the result was left out. That holds for the end of a text alone,
since templates may drop its beginning on purpose (Qwen3: the thoughts of earlier turns).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_eaft.data.rows import RowError

Render = Callable[[list[dict[str, Any]], list[Any] | None], str]
"""Messages and functions -> the text of the template."""


def check_kept(render: Render, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
    """Refuse a row of which the template leaves out a message, a call or a function.

    Args:
        render: the template.
        messages: of the row. Empty texts need no place.
        tools: functions of the row, or None.

    Raises:
        RowError: naming what is left out.
    """
    # Mark -> what it stands for.
    marks: dict[str, str] = {}

    def marked(text: str, what: str) -> str:
        mark = f"-kept{len(marks)}kept-"
        marks[mark] = what
        return text + mark

    def named(entry: Any, what: str) -> Any:
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return entry
        function = function | {"name": marked(function["name"], f"{what} {function['name']}")}
        return entry | {"function": function} if "function" in entry else function

    copies = []
    for number, message in enumerate(messages, start=1):
        copy, who = dict(message), f"message {number} ({message['role']})"
        if (copy.get("content") or "").strip():
            copy["content"] = marked(copy["content"], who)
        if copy.get("tool_calls"):
            copy["tool_calls"] = [named(call, f"{who}: the call of") for call in copy["tool_calls"]]
        copies.append(copy)
    text = render(copies, [named(tool, "the function") for tool in tools] if tools else None)
    for mark, what in marks.items():
        if mark not in text:
            raise RowError(f"{what}: the chat template leaves it out")


def has_functions(messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
    """Whether functions play a part in a row."""
    return bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)


def writes_functions(render: Render) -> bool:
    """Whether the template writes functions, a call and its result at all."""
    try:
        check_kept(render, *_example())
    except RowError:
        return False
    return True


def _example() -> tuple[list[dict[str, Any]], list[Any]]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    parameters = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
    function = {"name": "add", "description": "Adds.", "parameters": parameters}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3."},
    ]
    return messages, [{"type": "function", "function": function}]
