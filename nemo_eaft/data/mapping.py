"""From the columns of a row to messages and tools, as ``data.mapping`` says.

=================== ============================================================================================
``messages``        ``data.messages_column`` is a list of ``{"role", "content"}``, with ``tool_calls`` where
                    functions are called
``conversations``   it is a list of ShareGPT's ``{"from", "value"}`` (:mod:`nemo_eaft.data.sharegpt`)
``prompt_response`` ``data.prompt_column`` is the question of the user, ``data.response_column`` the answer, and
                    ``data.reasoning_column`` what is thought before it
``auto``            rows that have ``data.messages_column`` as the first; rows that have ``input`` and ``output`` stay
                    text
=================== ============================================================================================

A system message comes from the row's turns, else from ``data.system_column``, else from ``data.system``. Columns of
turns and tools may hold JSON text instead, as many data sets do: Parquet gives every struct of a column every key, null
where it has none.
"""

from __future__ import annotations

from typing import Any, Literal

from nemo_eaft.data.rows import RowError
from nemo_eaft.data.sharegpt import to_messages
from nemo_eaft.data.tools import parsed, tool_calls, tools
from nemo_eaft.settings_data import DataSettings

Kind = Literal["chat", "pair"]


def kind_of(data: DataSettings, values: dict[str, Any]) -> Kind | None:
    """What a row is: ``chat`` becomes messages, ``pair`` is ``input``/``output`` text; None: neither."""
    if data.mapping != "auto":
        return "chat"
    # A data set gives every row every column, None where it has no value.
    if values.get(data.turns_column) is not None:
        return "chat"
    return "pair" if values.get("input") is not None and values.get("output") is not None else None


def needed_columns(data: DataSettings) -> dict[str, str]:
    """Setting -> the column that every row must have."""
    if data.mapping == "prompt_response":
        names = ["prompt_column", "response_column"]
        names += ["reasoning_column"] if data.reasoning_column is not None else []
        needed = {f"data.{name}": getattr(data, name) for name in names}
    elif data.mapping == "auto":
        needed = {}
    else:
        needed = {"data.messages_column": data.turns_column}
    return needed | ({} if data.system_column is None else {"data.system_column": data.system_column})


def to_chat(data: DataSettings, values: dict[str, Any]) -> dict[str, Any]:
    """The row as ``{"messages": [...], "tools": [...] or None}``, for the chat template.

    Raises:
        RowError: a column is missing, or does not hold what it should.
    """
    for setting, column in needed_columns(data).items():
        if column not in values:
            raise RowError(f"no column {column!r} ({setting})")
    if data.mapping == "prompt_response":
        messages = _pair(data, values)
    else:
        column = data.turns_column
        turns = parsed(values.get(column), column)
        messages = to_messages(turns, column) if data.mapping == "conversations" else _with_calls(turns)
    system = _text(values, data.system_column) if data.system_column is not None else ""
    system = system or data.system or ""
    if system and isinstance(messages, list) and not _begins_with_system(messages):
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages, "tools": tools(values.get(data.tools_column), data.tools_column)}


def _pair(data: DataSettings, values: dict[str, Any]) -> list[dict[str, Any]]:
    prompt, answer = _text(values, data.prompt_column), _text(values, data.response_column)
    for column, text in ((data.prompt_column, prompt), (data.response_column, answer)):
        if not text.strip():
            raise RowError(f"{column!r} is empty")
    reasoning = _text(values, data.reasoning_column).strip() if data.reasoning_column is not None else ""
    if reasoning:
        answer = f"<think>\n{reasoning}\n</think>\n\n{answer.lstrip()}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _text(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{column!r} must be text, got {type(value).__name__}")
    return value or ""


def _with_calls(messages: Any) -> Any:
    """The messages with their calls in one form; whoever tokenizes them checks the rest."""
    if not isinstance(messages, list):
        return messages
    return [
        message | {"tool_calls": tool_calls(message["tool_calls"], f"message {number}")}
        if isinstance(message, dict) and message.get("tool_calls")
        else message
        for number, message in enumerate(messages, start=1)
    ]


def _begins_with_system(messages: list[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
