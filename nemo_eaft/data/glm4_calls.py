"""Calls of functions in the words of GLM-4-0414's chat template.

Most templates read ``tool_calls`` of a message and the role ``tool``. GLM-4-0414's (``chat_template`` in the
``tokenizer_config.json`` of THUDM/GLM-4-9B-0414 and -32B-0414) knows neither and passes over both without a word (read
in copies of the template of GLM-Z1-0414, its sibling; whether a model's own is like it is told by the words in it).
There a call is a message of the assistant whose ``metadata`` is the name of the function and whose content is the
arguments as JSON, and a result comes from the role ``observation``.
"""

from __future__ import annotations

import json
from typing import Any

END_OF_CALL = "<|observation|>"
"""What the model says after its last call: the token of the role that is to speak. The template writes it only where a
result follows."""


def takes_metadata(template: str) -> bool:
    """Whether a chat template wants calls in this form."""
    return "tool_calls" not in template and "observation" in template and "metadata" in template


def to_metadata(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in this form. Text beside calls, and every call after the first, become messages of their own, as
    the model itself writes them."""
    written: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            written.append({"role": "observation", "content": message.get("content", "")})
            continue
        calls = message.get("tool_calls")
        if not calls or (message.get("content") or "").strip():
            written.append({key: value for key, value in message.items() if key != "tool_calls"})
        for call in calls or []:
            function = call.get("function", call)
            arguments = function.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            written.append({"role": message["role"], "metadata": function["name"], "content": text})
    return written
